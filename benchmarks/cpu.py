"""The nano artifact beside transformers' own DeepseekV4 on the same weights and this CPU, interleaved in one run.

usage: python benchmarks/cpu.py [--checkpoint examples/nano] [--artifact build/nano-cpu] [--rounds 9] [--save]

Both sides do greedy decoding from the same random prompts in float32 with the same number of threads. Ours runs the
whole engine (scheduler, batch, executor, sampler), theirs a forward pass with its cache and an argmax. A round times
both, one after the other; the table gives the median of each and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from dsv4c.artifact import load_manifest
from dsv4c.checkpoint.hf_names import plain_names
from dsv4c.checkpoint.reader import Checkpoint, load_model_state
from dsv4c.config import ModelConfig
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.loader import load
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.request import Request
from dsv4c.runtime.scheduler import Limits

KINDS = {
    "window": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}
CONTEXT = 256  # tokens before the decoded ones
DECODE_STEPS = 24
PREFILL = 512
ROOT = Path(__file__).resolve().parent.parent


def theirs(checkpoint: Checkpoint) -> DeepseekV4ForCausalLM:
    """transformers' model with the checkpoint's weights, dequantised to float32."""
    c: ModelConfig = checkpoint.config
    kinds = [KINDS[c.attention_kind(i)] for i in range(c.num_hidden_layers)]
    rates = {KINDS["csa"]: 4, KINDS["hca"]: 128}
    scaling = {
        "type": "yarn", "factor": c.rope_scaling.factor, "beta_fast": c.rope_scaling.beta_fast,
        "beta_slow": c.rope_scaling.beta_slow,
        "original_max_position_embeddings": c.rope_scaling.original_max_position_embeddings,
    }  # fmt: skip
    names = (
        *("vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        *("qk_rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "num_experts_per_tok", "n_routed_experts"),
        *("n_shared_experts", "num_hash_layers", "routed_scaling_factor", "swiglu_limit", "sliding_window"),
        *("max_position_embeddings", "rope_theta", "compress_rope_theta", "index_n_heads", "index_head_dim"),
        *("index_topk", "hc_mult", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps"),
    )
    config = DeepseekV4Config(
        **{n: getattr(c, n) for n in names}, layer_types=kinds, compress_rates=rates, rope_scaling=scaling,
        num_key_value_heads=1, scoring_func="sqrtsoftplus", bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = DeepseekV4ForCausalLM(config).eval().float()
    state = load_model_state(checkpoint, torch.float32)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            parts = [state[n] for n in plain_names(name) if n in state]
            if parts:
                value.copy_(torch.cat(parts, 1) if len(parts) > 1 else parts[0])
    return model


class Ours:
    """An engine over the artifact."""

    def __init__(self, artifact: Path, requests: int) -> None:
        manifest = load_manifest(artifact)
        tokens = manifest.programs["step"].symbols["T"]
        sizes = PoolSizes.for_requests(manifest.kv_groups, requests, 1024, step_tokens=tokens)
        executor = load(artifact, Checkpoint(artifact / "weights"), sizes)
        limits = Limits(max_requests=requests, max_step_tokens=tokens)
        self.engine = Engine.for_manifest(executor, manifest, sizes, limits=limits)
        self.count = 0

    def submit(self, ids: torch.Tensor, new: int) -> None:
        for row in ids:
            self.count += 1
            params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
            self.engine.submit(Request(str(self.count), row.tolist(), params))

    def prefill(self, ids: torch.Tensor) -> float:
        self.submit(ids, 1)
        return self._drain(lambda: not self.engine.has_work)

    def decode(self, ids: torch.Tensor) -> float:
        self.submit(ids, DECODE_STEPS + 1)
        while any(r.num_generated < 1 for r in [*self.engine.scheduler.waiting, *self.engine.scheduler.running]):
            self.engine.step()
        return self._drain(lambda: not self.engine.has_work)

    def _drain(self, done: Callable[[], bool]) -> float:
        start = time.perf_counter()
        while not done():
            self.engine.step()
        return time.perf_counter() - start


@torch.no_grad()
def their_prefill(model: DeepseekV4ForCausalLM, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
    return time.perf_counter() - start


@torch.no_grad()
def their_decode(model: DeepseekV4ForCausalLM, ids: torch.Tensor) -> float:
    out = model(ids, use_cache=True, logits_to_keep=1)
    token, past = out.logits[:, -1:].argmax(-1), out.past_key_values
    start = time.perf_counter()
    for _ in range(DECODE_STEPS):
        out = model(token, past_key_values=past, use_cache=True)
        token, past = out.logits[:, -1:].argmax(-1), out.past_key_values
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "examples" / "nano")
    parser.add_argument("--artifact", type=Path, default=ROOT / "build" / "nano-cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="append the rows to benchmarks/cpu.jsonl")
    args = parser.parse_args()
    checkpoint = Checkpoint(args.checkpoint)
    model = theirs(checkpoint)
    cases: list[tuple[str, int, int, Callable[[torch.Tensor], float], Callable[[torch.Tensor], float]]] = []
    for batch in (1, 16):
        ours = Ours(args.artifact, batch)
        cases.append(
            (f"decode, batch {batch}", batch * DECODE_STEPS, CONTEXT, ours.decode, lambda i: their_decode(model, i))
        )
    single = Ours(args.artifact, 1)
    cases.append((f"prefill, {PREFILL} tokens", PREFILL, PREFILL, single.prefill, lambda i: their_prefill(model, i)))
    print(f"{'case':<22}{'ours tok/s':>12}{'transformers':>14}{'ratio':>8}   ({torch.get_num_threads()} threads)")
    for name, tokens, length, our_run, their_run in cases:
        batch = tokens // DECODE_STEPS if "decode" in name else 1
        rounds = []
        for r in range(args.rounds + 1):
            ids = torch.randint(
                3, checkpoint.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(r)
            )
            rounds.append((our_run(ids), their_run(ids)))
        rounds = rounds[1:]  # the first warms both up
        mine, other = (statistics.median(r[i] for r in rounds) for i in (0, 1))
        ratio = statistics.median(b / a for a, b in rounds)
        print(f"{name:<22}{tokens / mine:>12,.0f}{tokens / other:>14,.0f}{ratio:>7.1f}x")
        if args.save:
            row = {"case": name, "ours_tok_s": tokens / mine, "transformers_tok_s": tokens / other, "ratio": ratio,
                   "rounds": args.rounds, "threads": torch.get_num_threads(), "cpu": platform.processor() or cpu_name(),
                   "torch": torch.__version__, "date": date.today().isoformat()}  # fmt: skip
            with (ROOT / "benchmarks" / "cpu.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return 0


def cpu_name() -> str:
    """The CPU's own name on Linux."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    sys.exit(main())
