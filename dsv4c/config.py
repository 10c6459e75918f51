"""ModelConfig (Hugging Face's config.json keys), its presets, the paging of state, and the compile target.

All values are frozen dataclasses. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsv4c.errors import ConfigError
from dsv4c.nvfp4 import block_index, block_name, stated_blocks, statement

AttentionKind = Literal["window", "csa", "hca"]

DSPARK_KEYS = ("dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank")
"""Keys of a checkpoint with a DSpark drafter: all of them or none (model.md 1.4)."""


@dataclass(frozen=True)
class RopeScaling:
    """YaRN frequency scaling, used only in layers that compress (model.md 2.6). The amplitude factor is 1."""

    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class DSpark:
    """The DSpark drafter that a config's `dspark_*` keys describe."""

    block_size: int
    """Tokens drafted in one pass."""
    noise_token_id: int
    """What stands in the block for tokens not known yet."""
    target_layer_ids: tuple[int, ...]
    """Layers of the main model whose outputs it reads."""
    markov_rank: int
    num_stages: int


@dataclass(frozen=True)
class ModelConfig:
    """DeepSeek-V4's config.json, with its names. Lengths in tokens, sizes in channels."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    """One ratio a layer (0 window, small csa, large hca), then one 0 for each MTP layer or DSpark stage."""
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    n_shared_experts: int = 1
    swiglu_limit: float = 10.0
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    max_position_embeddings: int = 1048576
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    num_nextn_predict_layers: int = 1
    bos_token_id: int = 0
    eos_token_id: int = 1
    expert_dtype: str = "fp4"
    dspark_block_size: int | None = None
    dspark_noise_token_id: int | None = None
    dspark_target_layer_ids: tuple[int, ...] | None = None
    dspark_markov_rank: int | None = None
    nvfp4_layers: tuple[int, ...] = ()
    """Layers whose routed experts are NVFP4 in place of `expert_dtype`, counted as in `compress_ratios`, ascending.

    No key of its own: `quantization_config` says it (see dsv4c/nvfp4.py)."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"`{name}` must be positive, not {getattr(self, name)}")
        expected = self.num_hidden_layers + self.num_nextn_predict_layers
        spark = self.dspark
        if spark is not None:
            self._check_dspark(spark)
        elif len(self.compress_ratios) not in (expected, self.num_hidden_layers):
            raise ConfigError(
                f"`compress_ratios` has {len(self.compress_ratios)} entries, expected {expected}",
                hint="one for each of num_hidden_layers, then one for each of num_nextn_predict_layers",
            )
        if any(not 0 <= layer < len(self.compress_ratios) for layer in self.nvfp4_layers):
            block = block_name(self.nvfp4_layers[-1], self.num_hidden_layers)
            raise ConfigError(
                f"`quantized_layers` names `{block}.ffn.experts`, the model has {self.num_hidden_layers} layers and "
                f"{len(self.compress_ratios) - self.num_hidden_layers} behind them"
            )
        if self.num_attention_heads % self.o_groups:
            raise ConfigError(f"`o_groups` {self.o_groups} does not divide {self.num_attention_heads} heads")
        if self.qk_rope_head_dim > self.head_dim or self.qk_rope_head_dim % 2:
            raise ConfigError(f"`qk_rope_head_dim` {self.qk_rope_head_dim} must be even and at most `head_dim`")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError("`num_experts_per_tok` is larger than `n_routed_experts`")

    def _check_dspark(self, spark: DSpark) -> None:
        """Of a DSpark checkpoint `num_nextn_predict_layers` says nothing: it is 1 whatever the stages."""
        stages = self.compress_ratios[self.num_hidden_layers :]
        if not stages or any(stages):
            raise ConfigError(
                f"`compress_ratios` ends with {list(stages)} behind its {self.num_hidden_layers} layers, "
                "expected a 0 for each DSpark stage",
                hint="stages attend to a window only",
            )
        if spark.block_size < 2:
            raise ConfigError(f"`dspark_block_size` must be at least 2, not {spark.block_size}")
        if not 0 <= spark.noise_token_id < self.vocab_size:
            raise ConfigError(
                f"`dspark_noise_token_id` {spark.noise_token_id} is no token of a vocabulary of {self.vocab_size}"
            )
        if spark.markov_rank < 1:
            raise ConfigError(f"`dspark_markov_rank` must be positive, not {spark.markov_rank}")
        targets = spark.target_layer_ids
        if not targets or list(targets) != sorted(set(targets)):
            raise ConfigError(f"`dspark_target_layer_ids` {list(targets)} must be ascending, without repeats")
        if targets[0] < 0 or targets[-1] >= self.num_hidden_layers:
            raise ConfigError(
                f"`dspark_target_layer_ids` {list(targets)} must lie within the {self.num_hidden_layers} layers"
            )

    @property
    def dspark(self) -> DSpark | None:
        """The DSpark drafter, or None. Raises ConfigError where only some of its keys are given."""
        values = {key.removeprefix("dspark_"): getattr(self, key) for key in DSPARK_KEYS}
        missing = [f"dspark_{name}" for name, value in values.items() if value is None]
        if len(missing) == len(DSPARK_KEYS):
            return None
        if missing:
            raise ConfigError(
                f"config.json lacks `{'`, `'.join(missing)}`", hint="a DSpark drafter needs all of its `dspark_*` keys"
            )
        return DSpark(**values, num_stages=len(self.compress_ratios) - self.num_hidden_layers)

    @property
    def drafter(self) -> Literal["mtp", "dspark"] | None:
        """What drafts tokens for the main model, by the config's keys; a checkpoint may lack its tensors."""
        if self.dspark is not None:
            return "dspark"
        has_mtp = self.num_nextn_predict_layers == 1 and len(self.compress_ratios) > self.num_hidden_layers
        return "mtp" if has_mtp else None

    def attention_kind(self, layer: int) -> AttentionKind:
        """`window` (ratio 0), `csa` (overlapping, with the indexer; ratio below 16) or `hca` (ratio 16 and up)."""
        ratio = self.compress_ratios[layer]
        if ratio == 0:
            return "window"
        return "csa" if ratio < 16 else "hca"

    def gate_kind(self, layer: int) -> Literal["hash", "bias"]:
        """How a layer's tokens find their experts: by a table over token ids, or by affinity and a bias."""
        return "hash" if layer < self.num_hash_layers else "bias"

    def truncated(self, layers: int) -> ModelConfig:
        """The model's first `layers` layers as a model, with its head and MTP layers: for measurement.

        Raises ConfigError if it has not so many.
        """
        if not 1 <= layers <= self.num_hidden_layers:
            raise ConfigError(f"`--num-layers` is {layers}, the model has {self.num_hidden_layers}")
        ratios = (*self.compress_ratios[:layers], *self.compress_ratios[self.num_hidden_layers :])
        hashed = min(self.num_hash_layers, layers)  # not the MTP layers, which move up
        targets = self.dspark_target_layer_ids
        if targets is not None and targets[0] < self.num_hidden_layers - layers:
            raise ConfigError(
                f"`--num-layers` is {layers}, DSpark reads layer {targets[0]} of {self.num_hidden_layers}",
                hint=f"keep at least {self.num_hidden_layers - targets[0]}",
            )
        gone = self.num_hidden_layers - layers
        nvfp4 = (*(i for i in self.nvfp4_layers if i < layers),
                 *(i - gone for i in self.nvfp4_layers if i >= self.num_hidden_layers))  # fmt: skip
        return dataclasses.replace(
            self, num_hidden_layers=layers, compress_ratios=ratios, num_hash_layers=hashed, nvfp4_layers=nvfp4,
            dspark_target_layer_ids=targets and tuple(i - (self.num_hidden_layers - layers) for i in targets),
        )  # fmt: skip

    @property
    def ratios(self) -> tuple[int, ...]:
        """The distinct compression ratios of the main layers, ascending, without 0."""
        return tuple(sorted({r for r in self.compress_ratios[: self.num_hidden_layers] if r}))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Reads a config.json mapping. Unused keys of Hugging Face's file are ignored.

        Raises ConfigError that names what is missing or cannot be.
        """
        known = {f.name: f for f in dataclasses.fields(cls) if f.name != "nvfp4_layers"}
        values = {k: v for k, v in data.items() if k in known}
        missing = [
            n
            for n, f in known.items()
            if n not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ConfigError(f"config.json lacks `{'`, `'.join(missing)}`", hint="is it a DeepSeek-V4 config?")
        for name in ("compress_ratios", "dspark_target_layer_ids"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        scaling = values.get("rope_scaling")
        if isinstance(scaling, Mapping):
            kind = scaling.get("type", scaling.get("rope_type", "yarn"))
            if kind != "yarn":
                raise ConfigError(f"`rope_scaling.type` is `{kind}`, expected `yarn`")
            names = {f.name for f in dataclasses.fields(RopeScaling)}
            values["rope_scaling"] = RopeScaling(**{k: v for k, v in scaling.items() if k in names})
        return cls(**values).with_nvfp4(stated_blocks(data.get("quantization_config"), "config.json"))

    def with_nvfp4(self, blocks: Collection[str] | None) -> ModelConfig:
        """The same model with NVFP4 experts in these blocks (`layers.3`, `mtp.0`), or in no others than before.

        Empty means all main layers, as in NVIDIA's checkpoints; None leaves the config as it is. Raises ConfigError for
        a block that the model lacks.
        """
        if blocks is None:
            return self
        main = self.num_hidden_layers
        layers = {block_index(block, main) for block in blocks} or range(main)
        return dataclasses.replace(self, nvfp4_layers=tuple(sorted(layers)))

    @property
    def nvfp4_blocks(self) -> tuple[str, ...]:
        """The blocks of `nvfp4_layers` by name, in order."""
        return tuple(block_name(layer, self.num_hidden_layers) for layer in self.nvfp4_layers)

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Reads a config.json file. Raises ConfigError for a file that cannot be read, and as `from_dict` does."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read `{path}`: {error}") from error
        return cls.from_dict(data)

    @property
    def expert_formats(self) -> str:
        """How routed experts are stored, in words: `MXFP4`, or `NVFP4 in layers.0 to layers.42, MXFP4 in mtp.0`."""
        usual = {"fp4": "MXFP4"}.get(self.expert_dtype, self.expert_dtype.upper())
        if not self.nvfp4_layers:
            return usual
        others = tuple(layer for layer in range(len(self.compress_ratios)) if layer not in self.nvfp4_layers)
        found = f"NVFP4 in {self._blocks_text(self.nvfp4_layers)}"
        return f"{found}, {usual} in {self._blocks_text(others)}" if others else found

    def _blocks_text(self, layers: tuple[int, ...]) -> str:
        """`layers.0 to layers.42`, `layers.0 to layers.3, mtp.0`."""
        runs: list[list[int]] = []
        for layer in layers:
            if runs and runs[-1][-1] == layer - 1 and layer != self.num_hidden_layers:
                runs[-1].append(layer)
            else:
                runs.append([layer])
        ends = ([block_name(run[i], self.num_hidden_layers) for i in sorted({0, len(run) - 1})] for run in runs)
        return ", ".join(" to ".join(names) for names in ends)

    def to_dict(self) -> dict[str, Any]:
        """The config.json mapping, as DeepSeek publishes it."""
        out = dataclasses.asdict(self)
        del out["nvfp4_layers"]
        out["compress_ratios"] = list(self.compress_ratios)
        if self.dspark is None:
            out = {key: value for key, value in out.items() if key not in DSPARK_KEYS}
        else:
            out["dspark_target_layer_ids"] = list(self.dspark.target_layer_ids)
        out["rope_scaling"] = {"type": "yarn", **out["rope_scaling"]}
        out.update(
            architectures=["DeepseekV4ForCausalLM"],
            model_type="deepseek_v4",
            scoring_func="sqrtsoftplus",
            topk_method="noaux_tc",
            norm_topk_prob=True,
            hidden_act="silu",
            num_key_value_heads=1,
            attention_bias=False,
            attention_dropout=0.0,
            tie_word_embeddings=False,
            initializer_range=0.02,
            use_cache=True,
            torch_dtype="bfloat16",
            quantization_config={
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "scale_fmt": "ue8m0",
                "weight_block_size": [128, 128],
                **(statement(self.nvfp4_blocks) if self.nvfp4_layers else {}),
            },
        )
        return out


@dataclass(frozen=True)
class StateLayout:
    """How decoding state is paged: tokens covered by one page of each KV group, and ring lengths.

    A page of the window group holds `window_page` entries; a page of a group compressed by `m` covers
    `block_tokens` tokens and so holds `block_tokens / m` entries. `extra_ring` lengthens the compressor rings
    (tokens that speculation may have to overwrite).
    """

    window_page: int = 64
    block_tokens: int = 256
    extra_ring: int = 0

    def entries_per_page(self, ratio: int) -> int:
        """Entries in one page of the group of this compression ratio (0 is the window group)."""
        return self.window_page if ratio == 0 else self.block_tokens // ratio

    def ring(self, ratio: int, overlap: bool) -> int:
        """Rows of a compressor ring: the tokens an entry is pooled from (two windows if they overlap)."""
        return ratio * (2 if overlap else 1) + self.extra_ring


def _flash_like(layers: int, first: list[int]) -> tuple[int, ...]:
    ratios = list(first)
    while len(ratios) < layers:
        ratios.append(4 if len(ratios) % 2 == 0 else 128)
    return (*ratios, 0)


FLASH = ModelConfig(
    vocab_size=129280, hidden_size=4096, num_hidden_layers=43, num_attention_heads=64, head_dim=512,
    qk_rope_head_dim=64, q_lora_rank=1024, o_groups=8, o_lora_rank=1024, sliding_window=128,
    compress_ratios=_flash_like(43, [0, 0]), index_n_heads=64, index_head_dim=128, index_topk=512,
    n_routed_experts=256, num_experts_per_tok=6, moe_intermediate_size=2048, num_hash_layers=3,
    routed_scaling_factor=1.5,
)  # fmt: skip
FLASH_0731 = dataclasses.replace(
    FLASH, compress_ratios=(*FLASH.compress_ratios, 0, 0), dspark_block_size=5, dspark_noise_token_id=128799,
    dspark_target_layer_ids=(40, 41, 42), dspark_markov_rank=256,
)  # fmt: skip
"""Flash with a DSpark drafter of three stages in place of its MTP layer."""
PRO = ModelConfig(
    vocab_size=129280, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, head_dim=512,
    qk_rope_head_dim=64, q_lora_rank=1536, o_groups=16, o_lora_rank=1024, sliding_window=128,
    compress_ratios=_flash_like(61, [128, 128]), index_n_heads=64, index_head_dim=128, index_topk=1024,
    n_routed_experts=384, num_experts_per_tok=6, moe_intermediate_size=3072, num_hash_layers=3,
    routed_scaling_factor=2.5,
)  # fmt: skip
NANO = ModelConfig(
    vocab_size=4096, hidden_size=256, num_hidden_layers=6, num_attention_heads=8, head_dim=64,
    qk_rope_head_dim=32, q_lora_rank=128, o_groups=2, o_lora_rank=128, sliding_window=128,
    compress_ratios=(0, 4, 128, 4, 128, 4, 0), index_n_heads=16, index_head_dim=32, index_topk=64,
    n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=128, num_hash_layers=2,
    routed_scaling_factor=1.5, max_position_embeddings=4096,
    rope_scaling=RopeScaling(original_max_position_embeddings=1024),
)  # fmt: skip
"""Small, and with every component: window, csa and hca layers, hash and bias gates, MTP, FP4 experts."""

PRESETS: dict[str, ModelConfig] = {
    "flash": FLASH, "flash-0731": FLASH_0731, "flash-nvfp4": FLASH.with_nvfp4(()), "nano": NANO, "pro": PRO,
    "pro-nvfp4": PRO.with_nvfp4(()),
}  # fmt: skip
"""The models that are known by name: `nano` for tests and shows, the others as published, `-nvfp4` by NVIDIA."""


def preset(name: str) -> ModelConfig:
    """The preset of this `name` (`flash`, `pro`, `nano`, ...); raises ConfigError with the nearest name."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"presets are {', '.join(sorted(PRESETS))}"
    raise ConfigError(f"unknown preset `{name}`", hint=hint)


ARCHS = ("cpu", "sm_90a", "sm_100a", "sm_103a")


@dataclass(frozen=True)
class Target:
    """What an artifact is compiled for: an architecture `arch` (`cpu`, `sm_90a`, `sm_100a`, `sm_103a`), and how many
    ranks share tensors (`tp`) and experts (`ep`). Raises ConfigError with the nearest name, and for more than one."""

    arch: str
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if self.arch not in ARCHS:
            near = difflib.get_close_matches(self.arch, ARCHS, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"targets are {', '.join(ARCHS)}"
            raise ConfigError(f"unknown target `{self.arch}`", hint=hint)
        if self.tp != 1 or self.ep != 1:
            raise ConfigError(f"target `{self.arch}` supports one rank, not tp={self.tp}, ep={self.ep}")
