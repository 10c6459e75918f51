"""What an artifact needs whoever is served: weights, arena, inputs, code; on a GPU also what torch and CUDA take.

Pure functions of the manifest. Weights, arena and inputs are exact; what a library takes is estimated, each constant
with its source. On a card, CARD_SHARE of runtime/memory.py leaves room for what is not known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from dsv4c.artifact import Input, Manifest, Program, Weight
from dsv4c.errors import ConfigError
from dsv4c.runtime.executor import MAX_BINDINGS
from dsv4c.runtime.poolsizes import DTYPE_BYTES, ceil_div
from dsv4c.runtime.staging import ALIGNMENT, RESIDENT

GRAPH_NODE_BYTES = 4 << 10  # device memory of a captured launch: 3.3 KB measured (33 graphs, 3,819 launches, H200)
GRAPH_BYTES = 64 << 10  # of a CUDA graph besides its nodes; within the figure above
VENDOR_LAUNCHES = 3  # kernels of a vendor call at most: a copy of its scales, the product, the sum of its splits
BLAS_WORKSPACE_BYTES = 32 << 20  # torch's for each cuBLAS handle and stream on Hopper, shared with cuBLASLt
BLAS_STREAMS = 2  # the one that steps run on and the one that graphs are captured on
# What a process holds on a card before it allocates: 426 MiB by torch 2.10 with CUDA 13.0 on an RTX 6000 Ada (as
# reported in unslothai/unsloth-zoo #1053), 0.5 GiB by torch 2.11 with 12.8 on an A100 (JBjoernskov/Twin4Build #134).
CONTEXT_BYTES = 512 << 20
ARENA_MARGIN = 512  # bytes around the arena, to align it (runtime/buffers.py)
LOGPROB_COPIES = 3  # of a step's logits in float32, while log-probabilities are taken: raw, normalised, their best
BLOCK_BYTES = 2 << 20  # torch's allocator on a card rounds tensors of 10 MB and more up to a multiple
LARGE_BYTES = 10 << 20


@dataclass(frozen=True)
class Item:
    """Some memory, by what it is for."""

    name: str
    size_bytes: int
    why: str = ""


def fixed_items(manifest: Manifest, kernel_bytes: int) -> tuple[Item, ...]:
    """What is held from loading to the end. `kernel_bytes`: of `code_files`, as they lie on disk."""
    programs = tuple(manifest.programs.values())
    arena = max(p.arena_bytes for p in programs) + ARENA_MARGIN
    shared = f"shared by {len(programs)} programs" if len(programs) > 1 else ""
    items = [
        Item("weights", sum(map(weight_bytes, manifest.weights)), f"{len(manifest.weights):,} tensors"),
        Item("arena", arena, shared),
        _inputs(programs),
        Item("kernels", kernel_bytes, f"compiled code, {len(code_files(manifest)):,} loaded"),
    ]
    if manifest.target != "cpu":
        items += [_graphs(manifest), _logprobs(manifest), _workspaces(manifest), _rounding(manifest)]
        items.append(Item("CUDA context", CONTEXT_BYTES, "estimated, torch's kernels included"))
    return tuple(items)


def weight_bytes(weight: Weight) -> int:
    """Bytes of a runtime weight. Raises ConfigError for an unknown dtype."""
    return math.prod(weight.shape) * _dtype_bytes(weight.dtype, f"weight `{weight.name}`")


def _dtype_bytes(dtype: str, what: str) -> int:
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"{what} has the unknown dtype `{dtype}`", hint=f"known: {', '.join(sorted(DTYPE_BYTES))}")
    return DTYPE_BYTES[dtype]


def part_of(name: str) -> str:
    """A weight's name with `*` for numbers: the same in every layer."""
    return ".".join("*" if piece.isdigit() else piece for piece in name.split("."))


def code_files(manifest: Manifest) -> list[str]:
    """The compiled code that is loaded, a file as often as it is loaded: a GPU kernel's once for each entry point."""
    if manifest.target == "cpu":
        return sorted({k.file for k in manifest.kernels.values() if k.file is not None})
    launches = {(r.file, r.symbol, r.shared) for kernel in manifest.kernels.values() for r in kernel.launches}
    return sorted(file for file, _, _ in launches)


def _inputs(programs: Sequence[Program]) -> Item:
    """Programs of fixed sizes share one buffer and page tables; a mixed one keeps inputs for every binding."""
    bound = sum(MAX_BINDINGS * sum(_input_bytes(p, i) for i in p.inputs) for p in programs if p.any_size)
    staged = 0
    resident: dict[str, int] = {}
    for program in programs:
        if program.any_size:
            continue
        sizes = [_input_bytes(program, i) for i in program.inputs if i.kind not in RESIDENT]
        staged = max(staged, sum(ceil_div(size, ALIGNMENT) * ALIGNMENT for size in sizes))
        tables = {i.name: ceil_div(_input_bytes(program, i), ALIGNMENT) * ALIGNMENT for i in program.inputs}
        resident |= {i.name: tables[i.name] for i in program.inputs if i.kind in RESIDENT}
    why = f"at most, of {MAX_BINDINGS} sizes kept" if bound else "of a step, and page tables"
    return Item("inputs", bound + staged + sum(resident.values()), why)


def _input_bytes(program: Program, item: Input) -> int:
    rows = math.prod(program.symbols[n] if isinstance(n, str) else n for n in item.shape)
    return rows * _dtype_bytes(item.dtype, f"input `{item.name}`")


def _graphs(manifest: Manifest) -> Item:
    """Programs of fixed sizes are captured, each run of `graph` segments as one CUDA graph.

    A run in which masks come to be read is captured a second time, as two graphs that are cut there.
    """
    graphs = nodes = 0
    for program in manifest.programs.values():
        if program.any_size:
            continue
        masks = {item.name for item in program.inputs if item.kind == "masks"}
        for kind, segments in groupby(program.segments, key=lambda s: s.kind):
            calls = [call for segment in segments for call in segment.calls]
            reading = next((i for i, call in enumerate(calls) if masks.intersection(call.args)), None)
            if reading is not None:
                masks = set()
            if kind == "graph":
                graphs += 3 if reading else 1
                nodes += sum(_launches(manifest, call.kernel) for call in calls) * (2 if reading else 1)
    return Item("CUDA graphs", graphs * GRAPH_BYTES + nodes * GRAPH_NODE_BYTES, f"{graphs} of {nodes:,} launches")


def _launches(manifest: Manifest, kernel: str) -> int:
    found = manifest.kernels[kernel]
    return len(found.launches) if found.kind == "gpu" else VENDOR_LAUNCHES


def _logprobs(manifest: Manifest) -> Item:
    """Of programs that sample: log-probabilities are taken behind a step, from its logits."""
    rows = max((p.symbols["S"] for p in manifest.programs.values() if "tokens" in p.outputs), default=0)
    return Item("log-probabilities", LOGPROB_COPIES * rows * manifest.vocab_size * 4, f"of {rows} rows at most")


def _workspaces(manifest: Manifest) -> Item:
    vendor = any(kernel.kind == "aten" for kernel in manifest.kernels.values())
    return Item("workspaces", BLAS_STREAMS * BLAS_WORKSPACE_BYTES if vendor else 0, "cuBLAS" if vendor else "")


def _rounding(manifest: Manifest) -> Item:
    """What torch's allocator adds: to large weights exactly, to pools at most."""
    sizes = [size for size in map(weight_bytes, manifest.weights) if size >= LARGE_BYTES]
    pools = sum(len(g.pools) for g in manifest.kv_groups) + sum(len(s.pools) for s in manifest.state_groups)
    size = sum(-size % BLOCK_BYTES for size in sizes) + pools * BLOCK_BYTES
    return Item("rounding", size, "of large tensors to 2 MiB")
