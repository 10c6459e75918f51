"""DeepSeek-V4 as a plain function of a flat batch of tokens and explicit state: its own specification.

`Transformer.forward(step, state)` runs one step: chunks of prompts and single decode tokens of many requests, in
any mix, give the same logits as one request's whole prompt at once. `step` holds the int64 tensors that
dsv4c.artifact.InputKind lists; `state` the pools and rings that `init_state` makes. Nothing is changed in place.

Legend: T tokens, S rows whose logits are wanted, N streams, D hidden_size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4c.config import ModelConfig, StateLayout
from dsv4c.model.block import Block, _small
from dsv4c.model.dspark import DSparkStage, ExtendTap, StreamMean
from dsv4c.model.hyper import HyperHead
from dsv4c.model.linear import Linear
from dsv4c.model.mtp import MultiTokenPredictor
from dsv4c.model.norm import RMSNorm
from dsv4c.model.paging import EntrySlots, TakeRows, TokenSlots
from dsv4c.model.rope import EntryRopeTable, RopeTable


def embed_streams(token_ids: Tensor, weight: Tensor, *, hc_mult: int) -> Tensor:
    """[T, N, D]: every token's embedding in each of the N streams."""
    return nn.functional.embedding(token_ids, weight).unsqueeze(1).expand(-1, hc_mult, -1).contiguous()


def embed(token_ids: Tensor, weight: Tensor) -> Tensor:
    """[T, D]: every token's embedding."""
    return nn.functional.embedding(token_ids, weight)


class Embed(nn.Module):
    def forward(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        return embed(token_ids, weight)


class EmbedStreams(nn.Module):
    def __init__(self, hc_mult: int) -> None:
        super().__init__()
        self.hc_mult = hc_mult

    def forward(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        return embed_streams(token_ids, weight, hc_mult=self.hc_mult)


class Prelude(nn.Module):
    """What every layer of a step shares: RoPE tables and the pool rows of the entries written in this step."""

    def __init__(self, config: ModelConfig, layout: StateLayout) -> None:
        super().__init__()
        self.ratios = config.ratios
        dim, scaling = config.qk_rope_head_dim, config.rope_scaling
        self.rope_window = RopeTable(dim, config.rope_theta, None)
        self.rope_compressed = RopeTable(dim, config.compress_rope_theta, scaling)
        self.slots_window = TokenSlots(layout.entries_per_page(0))
        self.entry_rope = nn.ModuleDict()
        self.entry_slots = nn.ModuleDict()
        for ratio in self.ratios:
            self.entry_rope[str(ratio)] = EntryRopeTable(dim, config.compress_rope_theta, scaling, ratio)
            for group in groups_of_ratio(config, ratio):
                self.entry_slots[group] = EntrySlots(ratio, layout.entries_per_page(ratio))

    def forward(self, step: dict[str, Tensor]) -> dict[str, Tensor]:
        positions, request_rows = step["positions"], step["request_rows"]
        out = {
            "rope_window": self.rope_window(positions),
            "slots_window": self.slots_window(step["pages_window"], request_rows, positions),
        }
        if self.ratios:
            out["rope_compressed"] = self.rope_compressed(positions)
        for ratio in self.ratios:
            out[f"entry_rope_{ratio}"] = self.entry_rope[str(ratio)](positions, step[f"ends_{ratio}"])
        for group, slots in self.entry_slots.items():
            out[f"slots_{group}"] = slots(step[f"pages_{group}"], request_rows, positions, step[f"ends_{slots.ratio}"])
        return out


def groups_of_ratio(config: ModelConfig, ratio: int) -> tuple[str, ...]:
    """The KV groups written by layers of this ratio besides the window."""
    csa = config.attention_kind(config.compress_ratios.index(ratio)) == "csa"
    return (f"c{ratio}", "index") if csa else (f"c{ratio}",)


class Transformer(nn.Module):
    """The main model and its MTP block or DSpark stages. Parameter names are the checkpoint's; experts are stacked."""

    def __init__(self, config: ModelConfig, layout: StateLayout | None = None, *, fake_quant: bool = False) -> None:
        super().__init__()
        self.config = config
        self.layout = layout or StateLayout()
        n, dim = config.hc_mult, config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, dim)
        self.head = Linear(dim, config.vocab_size, float32=True)
        self.norm = RMSNorm(dim, config.rms_norm_eps)
        self.hc_head_fn = nn.Parameter(_small(n, n * dim))
        self.hc_head_base = nn.Parameter(torch.zeros(n))
        self.hc_head_scale = nn.Parameter(torch.ones(1))
        self.layers = nn.ModuleList(
            Block(config, self.layout, i, fake_quant=fake_quant) for i in range(config.num_hidden_layers)
        )
        self.mtp = nn.ModuleList(_drafter(config, self.layout, fake_quant=fake_quant))
        self.prelude = Prelude(config, self.layout)
        self.streams = EmbedStreams(n)
        self.take_rows = TakeRows()
        self.embed_next = Embed()
        self.tap_first, self.tap_next = StreamMean(), ExtendTap()
        self.hc_head = HyperHead(config.rms_norm_eps, config.hc_eps)

    def embed_tokens(self, step: dict[str, Tensor]) -> Tensor:
        """The first streams [T, N, D]."""
        out: Tensor = self.streams(step["token_ids"], self.embed.weight)
        return out

    def logits(self, x_TND: Tensor, logit_rows: Tensor) -> Tensor:
        """float32 [S, vocab_size] of the rows wanted."""
        x = self.take_rows(x_TND, logit_rows)
        x = self.norm(self.hc_head(x, self.hc_head_fn, self.hc_head_base, self.hc_head_scale))
        out: Tensor = self.head(x)
        return out

    def run(self, step: dict[str, Tensor], state: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The streams before the first layer and after each, and the state after the step."""
        step = {**step, **self.prelude(step)}
        streams, after = [self.embed_tokens(step)], dict(state)
        for i, block in enumerate(self.layers):
            prefix = f"layers.{i}."
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            x, own = block(streams[-1], own, step)
            streams.append(x)
            after.update({prefix + k: v for k, v in own.items()})
        return streams, after

    def forward(self, step: dict[str, Tensor], state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [S, vocab_size] and the state after the step."""
        streams, after = self.run(step, state)
        return self.logits(streams[-1], step["logit_rows"]), after

    def _mtp(self) -> MultiTokenPredictor:
        block = self.mtp[0]
        assert isinstance(block, MultiTokenPredictor)
        return block

    def _stages(self) -> list[DSparkStage]:
        return [stage for stage in self.mtp if isinstance(stage, DSparkStage)]

    def mtp_streams(self, x_TND: Tensor, next_ids: Tensor) -> Tensor:
        """The MTP block's input streams, from the main model's last streams and the next tokens' ids."""
        return self._mtp().merge(x_TND, self.embed_next(next_ids, self.embed.weight))

    def mtp_head(self, x_TND: Tensor, logit_rows: Tensor) -> Tensor:
        """float32 [S, vocab_size] of the rows wanted, from the MTP block's output streams."""
        out: Tensor = self.head(self._mtp().collapse(self.take_rows(x_TND, logit_rows)))
        return out

    def mtp_logits(
        self, x_TND: Tensor, next_ids: Tensor, step: dict[str, Tensor], state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [S, vocab_size] for the token after next, and the state after the step."""
        step = {**step, **self.prelude(step)}
        x, own = self.mtp[0](self.mtp_streams(x_TND, next_ids), {"window": state["mtp.0.window"]}, step)
        return self.mtp_head(x, step["logit_rows"]), {**state, "mtp.0.window": own["window"]}

    def tap(self, streams: list[Tensor]) -> Tensor:
        """[T, F]: what DSpark reads of a step, from the streams that `run` gives."""
        spark = self.config.dspark
        assert spark is not None
        first, *others = (streams[layer + 1] for layer in spark.target_layer_ids)
        out: Tensor = self.tap_first(first)
        for x in others:
            out = self.tap_next(out, x)
        return out

    def absorb(self, tap_TF: Tensor, step: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state with these tokens' entries in the window of every DSpark stage."""
        window = ("pages_window", "request_rows", "positions")
        made = {
            "rope_window": self.prelude.rope_window(step["positions"]),
            "slots_window": self.prelude.slots_window(*(step[name] for name in window)),
        }
        stages, after = self._stages(), dict(state)
        main_x = stages[0].main(tap_TF)
        for i, stage in enumerate(stages):
            after[f"mtp.{i}.window"] = stage.attn.absorb(main_x, state[f"mtp.{i}.window"], made)
        return after

    def draft(self, step: dict[str, Tensor], state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Drafts int64 [R, B] and confidences float32 [R, B] of a step made by `make_draft`; state does not change."""
        step = {**step, "rope_window": self.prelude.rope_window(step["positions"])}
        x = self.embed_tokens(step)
        for i, stage in enumerate(self._stages()):
            x, _ = stage(x, {"window": state[f"mtp.{i}.window"]}, step)
        return self.draft_head(x, step)

    def draft_head(self, x_TND: Tensor, step: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Drafts and confidences, from the last stage's streams."""
        return self._stages()[-1].choose(x_TND, self.head, step)


def _drafter(config: ModelConfig, layout: StateLayout, *, fake_quant: bool) -> list[Block]:
    """What the checkpoint keeps under `mtp`, by the config's keys."""
    spark = config.dspark
    if spark is not None:
        return [DSparkStage(config, layout, spark, i, fake_quant=fake_quant) for i in range(spark.num_stages)]
    return [MultiTokenPredictor(config, layout, fake_quant=fake_quant)] if config.drafter == "mtp" else []
