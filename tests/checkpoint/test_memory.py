"""Loading streams: its peak stays under 1.5 times what is kept, and only what is asked for becomes resident."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4c.checkpoint.dummy import DummySource
from dsv4c.checkpoint.source import load_model_state
from dsv4c.checkpoint.writer import Format, write_checkpoint
from dsv4c.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=4096, hidden_size=512, num_hidden_layers=3, num_attention_heads=4, head_dim=128, qk_rope_head_dim=64,
    q_lora_rank=128, o_groups=2, o_lora_rank=128, sliding_window=16, compress_ratios=(0, 4, 128, 0), index_n_heads=4,
    index_head_dim=32, index_topk=8, n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=256,
    num_hash_layers=1, routed_scaling_factor=1.5,
)  # fmt: skip

# A process of its own: peak memory never falls, and this one has other things in it.
LOAD = """
import json, sys
import torch
from dsv4c.checkpoint.reader import Checkpoint, load_model_state

def memory(key):  # not ru_maxrss: that one remembers the parent's peak
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))

torch.set_num_threads(1)
warm_path, path, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
load_model_state(Checkpoint(warm_path), dtype)  # code and thread pools that any load needs
checkpoint = Checkpoint(path)
checkpoint.validate()
before = memory("VmRSS")
state = load_model_state(checkpoint, dtype)
print(json.dumps({
    "before": before,
    "after": memory("VmRSS"),
    "peak": memory("VmHWM"),
    "kept": sum(tensor.nbytes for tensor in state.values()),
}))
"""


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.checkpoint.conftest import SMALL

    path = tmp_path_factory.mktemp("warm")
    write_checkpoint(path, SMALL, load_model_state(DummySource(SMALL)))
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("storage", "dtype"), [("fp4", "float32"), ("fp4", "bfloat16"), ("bf16", "bfloat16"), ("bf16", "float32")]
)
def test_peak_is_under_one_and_a_half_times_what_is_kept(
    tmp_path: Path, warm: Path, storage: Format, dtype: str
) -> None:
    linear: Format = "fp8" if storage == "fp4" else storage
    state = load_model_state(DummySource(CONFIG))
    write_checkpoint(tmp_path, CONFIG, state, expert_format=storage, linear_format=linear, shard_bytes=8 << 20)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    command = [sys.executable, "-c", LOAD, str(warm), str(tmp_path), dtype]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    sizes = json.loads(done.stdout)
    assert sizes["kept"] > 40 << 20
    assert sizes["peak"] - sizes["before"] < 1.5 * sizes["kept"], sizes
    assert sizes["after"] - sizes["before"] < 1.2 * sizes["kept"], sizes
