"""transformers' DeepseekV4, eager in BF16, on the layers that `gpu_engine.py` measures: the comparison on one card.

usage: python benchmarks/transformers_gpu.py [--layers 4] [--decode 1 16 64] [--context 1024] [--prefill 2048 8192]

Random weights of the same magnitudes as the artifact's dummies; the experts dequantised to BF16, as transformers runs
them, are 12.9 GB a layer. A case that does not fit the card is printed as such.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from dsv4c.config import FLASH

KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
STEPS = 10


def build(layers: int) -> Any:
    """The first layers of `flash` at full width, on the card."""
    c = FLASH
    config = DeepseekV4Config(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=layers,
        layer_types=[KINDS[r] for r in c.compress_ratios[:layers]], num_attention_heads=c.num_attention_heads,
        num_key_value_heads=1, head_dim=c.head_dim, qk_rope_head_dim=c.qk_rope_head_dim, q_lora_rank=c.q_lora_rank,
        o_groups=c.o_groups, o_lora_rank=c.o_lora_rank, sliding_window=c.sliding_window,
        compress_rates={KINDS[4]: 4, KINDS[128]: 128}, index_n_heads=c.index_n_heads,
        index_head_dim=c.index_head_dim, index_topk=c.index_topk, n_routed_experts=c.n_routed_experts,
        n_shared_experts=1, num_experts_per_tok=c.num_experts_per_tok, moe_intermediate_size=c.moe_intermediate_size,
        num_hash_layers=c.num_hash_layers, scoring_func="sqrtsoftplus",
        routed_scaling_factor=c.routed_scaling_factor, swiglu_limit=c.swiglu_limit, hc_mult=c.hc_mult,
        hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=c.rms_norm_eps, max_position_embeddings=131072,
        rope_theta=c.rope_theta, compress_rope_theta=c.compress_rope_theta,
        rope_scaling={"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32,
                      "beta_slow": 1},
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = DeepseekV4ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            p.normal_(0, p.shape[-1] ** -0.5)
        elif "norm" in name or "scale" in name:
            p.uniform_(0.9, 1.1)
    for name, b in model.named_buffers():
        if name.endswith("tid2eid"):
            b.copy_(torch.rand(b.shape[0], c.n_routed_experts, device="cuda").topk(b.shape[1]).indices)
    return model


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    out = call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), out


def decode(model: Any, batch: int, context: int) -> dict[str, Any]:
    vocab = model.config.vocab_size
    out = model(torch.randint(0, vocab, (batch, context), device="cuda"), use_cache=True, logits_to_keep=1)
    cache, times = out.past_key_values, []
    for _ in range(STEPS):
        ids = torch.randint(0, vocab, (batch, 1), device="cuda")
        ms, out = timed(lambda ids=ids, cache=cache: model(ids, past_key_values=cache, use_cache=True))  # type: ignore[misc]
        cache = out.past_key_values
        times.append(ms)
    return {"phase": "decode", "batch": batch, "context": context, "ms": round(statistics.median(times[2:]), 3)}


def prefill(model: Any, tokens: int) -> dict[str, Any]:
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device="cuda")
    times = [timed(lambda: model(ids, use_cache=True, logits_to_keep=1))[0] for _ in range(3)]
    return {"phase": "prefill", "tokens": tokens, "ms": round(min(times), 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prefill", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--rows", type=Path)
    args = parser.parse_args()
    head = {
        "hardware": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat(), "layers": args.layers,
        "implementation": "transformers eager bf16",
    }  # fmt: skip
    with torch.no_grad():
        model = build(args.layers)
        print(f"{torch.cuda.memory_allocated() / 1e9:.1f} GB of weights", flush=True)
        cases: list[tuple[Callable[..., dict[str, Any]], tuple[int, ...]]] = [
            *((prefill, (tokens,)) for tokens in args.prefill),
            *((decode, (batch, args.context)) for batch in args.decode),
        ]
        for case, sizes in cases:
            try:
                row = case(model, *sizes)
            except torch.OutOfMemoryError:
                print(f"{case.__name__} {sizes}: out of memory", flush=True)
                continue
            print(row, flush=True)
            if args.rows:
                with args.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**head, **row}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
