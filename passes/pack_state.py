"""KV entries are stored packed: window and compressed entries in FP8, index keys in FP8 or FP4.

%1 = dsv4.norm_rope_write(%window, ...)             ->  dsv4.norm_rope_pack
%1 = dsv4.compress(...); norm_rope_write(%c4, %1)   ->  dsv4.compress_pack: pooled, normalised, rotated, packed, written
%1 = dsv4.split_heads_rope; dsv4.index_topk         ->  dsv4.index_query; dsv4.index_topk_packed
%1 = dsv4.attend_csa(...)                           ->  dsv4.attend_csa_packed

The model was trained with these formats simulated (model.md 2.10): scales are powers of two, rotated channels stay
BF16, index vectors go through a Hadamard rotation first, which changes nothing but what is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from dsv4c.config import ModelConfig, StateLayout
from dsv4c.errors import PassError
from dsv4c.facts import reads
from dsv4c.ops import TensorType
from dsv4c.ops.formats import IndexFormat, index_sizes, kv_sizes
from dsv4c.passes._rewriting import call_before, erase, output_of, outputs
from dsv4c.pipeline import Pass
from dsv4c.program import Program, is_op, op_name, types_of

ATTEND = ("attend_window", "attend_csa", "attend_hca")


@dataclass(frozen=True)
class PackState(Pass):
    name: ClassVar[str] = "pack-state"
    needs: ClassVar[frozenset[str]] = frozenset({"norm-rope-write-fused", "head-rope-fused", "stored-linears-fused"})
    gives: ClassVar[frozenset[str]] = frozenset({"state-packed"})
    exact: ClassVar[bool] = False
    tolerance: ClassVar[float] = (
        0.25  # a channel is off by 2^-4 at most; where terms of a score cancel, it counts for more
    )
    why: ClassVar[str] = (
        "KV entries are rounded to FP8 (3 bits of mantissa), index vectors to FP8 or FP4, as in training"
    )

    index_format: IndexFormat = "fp8"

    def apply(self, program: Program) -> int:
        count = 0
        for graph in program.graphs.values():
            packer = _Packer(graph, program.config, program.layout, self.index_format)
            count += packer.run()
        return count


@dataclass
class _Packer:
    graph: fx.Graph
    config: ModelConfig
    layout: StateLayout
    index_format: IndexFormat
    count: int = 0

    def run(self) -> int:
        for node in [n for n in self.graph.nodes if n.op == "placeholder" and n.meta["value"].kind == "state"]:
            self._retype(node)
        for write in [n for n in self.graph.nodes if is_op(n, "norm_rope_write")]:
            compress = reads(write, 2, "compress", 0)
            self._window(write) if compress is None else self._compressed(write, compress)
        for topk in [n for n in self.graph.nodes if is_op(n, "index_topk")]:
            self._index(topk)
        for attend in [n for n in self.graph.nodes if any(is_op(n, name) for name in ATTEND)]:
            self._attend(attend)
        for attend in [n for n in self.graph.nodes if is_op(n, "attend_block")]:
            raise PassError(
                f"`{attend.format_node()}` has no form that reads packed entries",
                hint="DSpark drafts on `cpu` only: capture without the drafter",
            )
        return self.count

    def _group(self, state: fx.Node) -> str:
        return str(state.meta["value"].name).rsplit(".", 1)[-1]

    def _retype(self, node: fx.Node) -> None:
        group = self._group(node)
        if "ring" in group:
            return
        if group == "index":
            size = sum(index_sizes(self.config.index_head_dim, self.index_format))
        else:
            size = sum(kv_sizes(self.config.head_dim, self.config.qk_rope_head_dim))
        node.meta["type"] = TensorType((node.meta["type"].shape[0], size), "uint8")
        self.count += 1

    def _window(self, write: fx.Node) -> None:
        pool = write.args[0]
        assert isinstance(pool, fx.Node)
        attrs = {**write.kwargs, "entries_per_page": self.layout.entries_per_page(0)}
        write.replace_all_uses_with(call_before(write, "norm_rope_pack", write.args, attrs, pool.meta["type"]))
        erase(write)
        self.count += 1

    def _compressed(self, write: fx.Node, compress: fx.Node) -> None:
        pool, slots, _, norm_weight, table = write.args
        k, gate, ape, ring_k, ring_z, *where = compress.args
        assert isinstance(pool, fx.Node)
        both = self._adjacent(k, gate, compress)
        ratio = int(str(compress.kwargs["ratio"]))
        attrs = {
            **compress.kwargs, "eps": write.kwargs["eps"], "entries_per_page": self.layout.entries_per_page(ratio),
            "format": self.index_format if self._group(pool) == "index" else "kv",
        }  # fmt: skip
        types = (*types_of(compress)[1:], pool.meta["type"])
        args = (both, ape, ring_k, ring_z, norm_weight, table, pool, slots, *where)
        fused = call_before(write, "compress_pack", args, attrs, types)
        old = outputs(compress)
        for index in (1, 2):
            if index in old:
                old[index].replace_all_uses_with(output_of(fused, index - 1, write))
        write.replace_all_uses_with(output_of(fused, 2, write))
        erase(write, *old.values(), compress)
        self.count += 1

    def _adjacent(self, k: Any, gate: Any, place: fx.Node) -> fx.Node:
        """One view of the columns of k and, right behind, of the gate."""
        together = (
            is_op(k, "columns") and is_op(gate, "columns") and k.args[0] is gate.args[0]
            and int(gate.kwargs["start"]) == int(k.kwargs["start"]) + int(k.kwargs["length"])
        )  # fmt: skip
        if not together:
            raise PassError(f"the projections of `{place.format_node()}` are no neighbouring columns of one linear map")
        kind = k.meta["type"]
        length = int(k.kwargs["length"]) + int(gate.kwargs["length"])
        wide = TensorType((*kind.shape[:-1], length), kind.dtype)
        return call_before(place, "columns", (k.args[0],), {"start": k.kwargs["start"], "length": length}, wide)

    def _index(self, topk: fx.Node) -> None:
        split, weight, pool, pages, request_rows, positions = topk.args
        if not is_op(split, "split_heads_rope"):
            raise PassError(f"`{topk.format_node()}` does not read rotated queries")
        assert isinstance(split, fx.Node)
        heads, dim = self.config.index_n_heads, self.config.index_head_dim
        tokens = types_of(topk)[0].shape[0]
        packed = TensorType((tokens, heads, dim), "uint8")  # E4M3, whatever the keys' format
        attrs = {"num_heads": heads, "format": self.index_format}
        query = call_before(
            topk, "index_query", (*split.args, weight), attrs, (packed, TensorType((tokens, heads), "float32"))
        )
        args = (output_of(query, 0, topk), output_of(query, 1, topk), pool, pages, request_rows, positions)
        picks = TensorType(types_of(topk)[0].shape, "int32")
        found = call_before(topk, "index_topk_packed", args, {**topk.kwargs, "format": self.index_format}, picks)
        topk.replace_all_uses_with(found)
        erase(topk, split)
        self.count += 1

    def _attend(self, attend: fx.Node) -> None:
        name = f"{op_name(attend)}_packed"
        attrs = {**attend.kwargs, "rope_dim": self.config.qk_rope_head_dim}
        attend.replace_all_uses_with(call_before(attend, name, attend.args, attrs, attend.meta["type"]))
        erase(attend)
        self.count += 1
