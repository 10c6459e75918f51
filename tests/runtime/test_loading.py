"""Loading a whole model: streamed weights equal the transforms taken literally, damage is named, memory stays low."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4c.artifact import Manifest, Weight, load_manifest
from dsv4c.checkpoint.dummy import DummySource
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.checkpoint.source import load_model_state
from dsv4c.checkpoint.writer import write_checkpoint
from dsv4c.config import ModelConfig
from dsv4c.errors import CheckpointError
from dsv4c.runtime.recipe import recipe_of
from dsv4c.runtime.streaming import THREAD_NAME
from dsv4c.runtime.weights import CARD, HOST, ReadAhead, load_weights, staging_bytes
from tests.runtime.plain_weights import load_weight as plain

AHEADS = {"host": HOST, "card": CARD, "small": ReadAhead(40_000, 3, 2), "one byte": ReadAhead(1, 2, 2)}


@pytest.fixture(params=["cpu", "sm_90a"])
def manifest(request: pytest.FixtureRequest, nano_artifact: Path) -> Manifest:
    if request.param == "cpu":
        return load_manifest(nano_artifact)
    found: Manifest = request.getfixturevalue("hopper_manifest")
    return found


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


def same(a: Tensor, b: Tensor) -> bool:
    """Dtype, shape and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("kind", ["checkpoint", "dummy"])
@pytest.mark.parametrize("ahead", AHEADS)
def test_streamed_weights_equal_the_transforms_taken_literally(
    manifest: Manifest, nano_dir: Path, kind: str, ahead: str
) -> None:
    config = ModelConfig.from_dict(manifest.model)
    source: Any = Checkpoint(nano_dir) if kind == "checkpoint" else DummySource(config, 3)
    got, report = load_weights(manifest.weights, source, ahead=AHEADS[ahead])
    assert list(got) == [weight.name for weight in manifest.weights]
    for weight in manifest.weights:
        assert got[weight.name].is_contiguous()
        assert same(got[weight.name], plain(weight, source)), weight.name
    assert report.weights == len(manifest.weights) and report.bytes > 3_000_000


def test_experts_are_laid_out_unit_by_unit(manifest: Manifest, nano_dir: Path) -> None:
    """Nowhere does a whole stack exist twice, and on Hopper no weight does."""
    checkpoint = Checkpoint(nano_dir)
    for weight in manifest.weights:
        if weight.sources and (manifest.target != "cpu" or len(weight.sources) == 16):
            assert recipe_of(weight, checkpoint).granule == 1, weight.name


def test_units_keep_to_the_size_that_the_plan_counts_with(manifest: Manifest, nano_dir: Path) -> None:
    checkpoint, ahead = Checkpoint(nano_dir), HOST if manifest.target == "cpu" else CARD
    units = [u for w in manifest.weights if w.sources for u in recipe_of(w, checkpoint).units(ahead.unit_bytes)]
    assert max(unit.room for unit in units) <= ahead.unit_bytes
    assert staging_bytes(manifest) >= 5 * ahead.unit_bytes


# Damage: what a checkpoint may hold, by the target whose loading finds it.

WQ_B, EXPERT, TABLE = "layers.0.attn.wq_b", "layers.1.ffn.experts.2.w1", "layers.0.ffn.gate.tid2eid"


def nan_byte(scale: Tensor) -> Tensor:
    scale.view(torch.uint8)[0, 0] = 255
    return scale


def large(scale: Tensor) -> Tensor:
    scale.view(torch.uint8)[1, 1] = 140
    return scale


def repeat(table: Tensor) -> Tensor:
    table[7] = 3
    return table


DAMAGE: dict[str, tuple[str, str, Callable[[Tensor], Tensor], str]] = {
    "misshapen": ("cpu", f"{EXPERT}.weight", lambda t: t[:, :100].clone(), f"`{EXPERT}.weight` in .* shape is "),
    "misshapen-stored": ("sm_90a", f"{EXPERT}.weight", lambda t: t[:, :100].clone(),
                         "tensors of weight `layers.1.ffn.experts.w1.data` do not fit together"),
    "half": ("cpu", f"{WQ_B}.weight", lambda t: t.float().half(), "dtype is F16, expected F8_E4M3 or"),
    "half-stored": ("sm_90a", f"{WQ_B}.weight", lambda t: t.float().half(),
                    f"`{WQ_B}.weight` is stored as torch.float16, the artifact reads it as float8_e4m3fn"),
    "nan": ("cpu", f"{WQ_B}.scale", nan_byte, f"`{WQ_B}.scale` in .*: found 1 NaN or infinite scales"),
    "nan-stored": ("sm_90a", f"{WQ_B}.scale", nan_byte, f"`{WQ_B}.scale` holds 1 NaN or infinite scales"),
    "odd-scale": ("cpu", f"{WQ_B}.scale", lambda t: torch.full(t.shape, 1.001),
                  f"`{WQ_B}.weight` holds values that bfloat16 cannot hold exactly"),
    "large-scale": ("sm_90a", f"{EXPERT}.scale", large,
                    "`layers.1.ffn.experts.w1.scale` does not fit its layout: a stored value is 140, the kernel"),
    "odd-norm": ("sm_90a", "layers.2.attn.q_norm.weight", lambda t: torch.full(t.shape, 1.001),
                 "`layers.2.attn.q_norm.weight` holds values that bfloat16 cannot hold exactly"),
    "repeated": ("sm_90a", TABLE, repeat, r"row 7 is \[3, 3\], expected 2 distinct experts"),
    "negative": ("cpu", TABLE, lambda t: t - 1, "found expert -1, expected 0 to 15"),
    "beyond": ("sm_90a", TABLE, lambda t: t + 1, "found expert 16, expected 0 to 15"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(
    damage: str, nano_dir: Path, tmp_path: Path, nano_artifact: Path, hopper_manifest: Manifest
) -> None:
    target, name, change, message = DAMAGE[damage]
    for file in nano_dir.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(nano_dir / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, tmp_path / "model.safetensors")
    manifest = load_manifest(nano_artifact) if target == "cpu" else hopper_manifest
    with pytest.raises(CheckpointError, match=message):
        load_weights(manifest.weights, Checkpoint(tmp_path))


def test_a_missing_tensor_is_named(manifest: Manifest, nano_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((nano_dir / "config.json").read_bytes())
    tensors = load_file(nano_dir / "model.safetensors")
    del tensors[f"{EXPERT}.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"`{EXPERT}.weight` is missing in"):
        load_weights(manifest.weights, Checkpoint(tmp_path))


def test_a_file_cut_while_it_is_read(manifest: Manifest, nano_dir: Path, tmp_path: Path) -> None:
    for file in (*nano_dir.glob("*.json"), nano_dir / "model.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    size = (tmp_path / "model.safetensors").stat().st_size
    checkpoint = Checkpoint(tmp_path)

    def cut(now: object) -> None:
        os.truncate(tmp_path / "model.safetensors", size // 10)

    with pytest.raises(CheckpointError, match=f"data ends at byte .* but the file has {size // 10} bytes by now"):
        load_weights(manifest.weights, checkpoint, cut, ahead=ReadAhead(40_000, 3, 2))


# The peak of loading, in a process of its own: peak memory never falls, and this one has other things in it.

CONFIG = ModelConfig(
    vocab_size=4096, hidden_size=512, num_hidden_layers=2, num_attention_heads=4, head_dim=128, qk_rope_head_dim=64,
    q_lora_rank=128, o_groups=2, o_lora_rank=128, sliding_window=16, compress_ratios=(0, 4, 0), index_n_heads=4,
    index_head_dim=128, index_topk=8, n_routed_experts=64, num_experts_per_tok=2, moe_intermediate_size=256,
    num_hash_layers=1, routed_scaling_factor=1.5,
)  # fmt: skip
LOAD = """
import json, sys
import torch
from dsv4c.artifact import Weight
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.runtime.weights import load_weights
from dsv4c.strictjson import decode

def memory(key):  # not ru_maxrss: that one remembers the parent's peak
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))

torch.set_num_threads(1)
weights = [decode(Weight, item) for item in json.load(open(sys.argv[2]))]
checkpoint = Checkpoint(sys.argv[1])
load_weights([w for w in weights if "w2" in w.name][:1], checkpoint)  # code that any load needs
before = memory("VmRSS")
out, _ = load_weights(weights, checkpoint)
kept = sum(tensor.nbytes for tensor in out.values())
print(json.dumps({"before": before, "peak": memory("VmHWM"), "kept": kept}))
"""


def as_on_a_cpu() -> Iterator[Weight]:
    """Most of CONFIG's weights: panels of 32 rows, transposed."""
    for name in ("embed", "head"):
        yield Weight(name, (128, 512, 32), "bfloat16", (f"{name}.weight",), panels(128, 32, 512))
    for layer in range(CONFIG.num_hidden_layers):
        for matrix, n, k in (("w1", 256, 512), ("w2", 512, 256), ("w3", 256, 512)):
            prefix = f"layers.{layer}.ffn.experts"
            sources = tuple(f"{prefix}.{e}.{matrix}.weight" for e in range(CONFIG.n_routed_experts))
            transforms = (("dequantise",), ("stack",), *panels(64, n // 32, 32, k)[1:])
            yield Weight(f"{prefix}.{matrix}", (64, n // 32, k, 32), "bfloat16", sources, transforms)


def panels(*sizes: int) -> tuple[tuple[Any, ...], ...]:
    return ("dequantise",), ("reshape", list(sizes)), ("transpose",), ("narrow", "bfloat16")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_is_under_one_and_a_half_times_what_is_kept(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, load_model_state(DummySource(CONFIG)))
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps([dataclasses.asdict(weight) for weight in as_on_a_cpu()]))
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", LOAD, str(tmp_path), str(weights)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    sizes = json.loads(done.stdout)
    assert sizes["kept"] > 100 << 20
    assert sizes["peak"] - sizes["before"] < 1.5 * sizes["kept"], sizes
