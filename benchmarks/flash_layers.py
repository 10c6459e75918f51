"""Device time of whole steps of the first layers of `flash` at full width, with dummy weights made on the card.

usage: python benchmarks/flash_layers.py build DIR [--layers 4] [--decode 1 16 64 128 256] [--prefill 8192]
       python benchmarks/flash_layers.py run DIR [--context 1024] [--breakdown]

`build` needs no GPU: one artifact for each batch. `run` binds each, captures one CUDA graph of a step and prints the
median time of its replays, with and without the head (final mix, norm, lm_head). The four layers are a window layer
twice, csa and hca (ratios 0, 0, 4, 128), as in the figures recorded for vLLM 0.25.0 on the same card. Dummy routing
spreads over all experts. Sampling is not part of a step here.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dsv4c import artifact
from dsv4c.compile import Options, compile_artifact
from dsv4c.config import FLASH, ModelConfig, StateLayout, Target
from dsv4c.model.state import columns, make_step
from dsv4c.runtime.dummy import make_weights
from dsv4c.runtime.executor import ArtifactExecutor
from dsv4c.runtime.kernels import Kernels
from dsv4c.trial import time_graph


def build(folder: Path, layers: int, decode: Sequence[int], prefill: Sequence[int], context: int) -> None:
    config = FLASH.truncated(layers)
    for name, tokens, requests in [*((f"decode{b}", b, b) for b in decode), *((f"prefill{t}", t, 1) for t in prefill)]:
        options = Options(max_context=max(context, tokens) + 512, max_tokens=tokens, max_requests=requests)
        cache = Path("build/.tune-cache")
        compile_artifact(config, Target("sm_90a"), folder / name, options, cache=cache, progress=_progress)
        print(f"built {name}", file=sys.stderr)


def _progress(done: int, total: int, name: str) -> None:
    print(f"\r{done}/{total}", end="" if done < total else "\n", file=sys.stderr, flush=True)


def executor_of(folder: Path, config: ModelConfig, requests: int, context: int) -> ArtifactExecutor:
    manifest = artifact.load_manifest(folder)
    device = torch.device("cuda:0")
    weights, made = make_weights(manifest, 0, device=device)
    print(made, file=sys.stderr)
    states: dict[str, Tensor] = {}
    layout = StateLayout()
    for group in manifest.kv_groups:
        pages = 1 + requests * columns(config, layout, group.name, context)
        for pool in group.pools:
            rows = pages * group.entries_per_page
            states[pool.name] = torch.zeros(rows, *pool.entry_shape, dtype=getattr(torch, pool.dtype), device=device)
    for group in manifest.state_groups:
        for pool in group.pools:
            states[pool.name] = torch.zeros(
                requests + 1, *pool.entry_shape, dtype=getattr(torch, pool.dtype), device=device
            )
    kernels = Kernels(manifest.kernels, folder, manifest.target)
    return ArtifactExecutor(manifest.programs["step"], kernels, weights, states, device)


def step_of(config: ModelConfig, name: str, context: int) -> tuple[dict[str, Tensor], int, int]:
    """The step's inputs, and the requests and tokens of its state."""
    generator = torch.Generator().manual_seed(1)
    if name.startswith("decode"):
        batch = int(name.removeprefix("decode"))
        lengths = torch.randint(context - 64, context, (batch,), generator=generator).tolist()
        spans = [(r, n, torch.randint(0, config.vocab_size, (1,), generator=generator)) for r, n in enumerate(lengths)]
        room = context + 64
    else:
        tokens = int(name.removeprefix("prefill"))
        spans, batch, room = [(0, 0, torch.randint(0, config.vocab_size, (tokens,), generator=generator))], 1, tokens
    return make_step(config, StateLayout(), spans, room, logits="last"), batch, room


def measure(folder: Path, config: ModelConfig, context: int, breakdown: bool) -> str:
    inputs, requests, room = step_of(config, folder.name, context)
    executor = executor_of(folder, config, requests, room)
    executor.step(inputs)
    torch.cuda.synchronize()
    calls = executor.bound_calls(inputs)
    body = [run for call, run in calls if call.scope != "head"]
    whole = time_graph(lambda: [run() for _, run in calls])
    without = time_graph(lambda: [run() for run in body])
    if breakdown:
        print("\n".join(_breakdown(folder, calls)))
    return f"{folder.name:14} {without / 1e3:8.3f} ms without head, {whole / 1e3:8.3f} ms with"


def _breakdown(folder: Path, calls: Sequence[tuple[artifact.Call, Callable[[], object]]]) -> list[str]:
    """Microseconds by op: each call alone, several times in one graph (its inputs warm in L2 where they fit)."""
    kernels: Mapping[str, artifact.Kernel] = artifact.load_manifest(folder).kernels
    total: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for call, run in calls:
        kernel = kernels[call.kernel]
        total[kernel.schedule] += time_graph(lambda run=run: [run() for _ in range(8)]) / 8  # type: ignore[misc]
        count[kernel.schedule] += 1
    order = sorted(total, key=lambda name: -total[name])
    return [f"    {total[n]:9.1f} us  {count[n]:3} x {total[n] / count[n]:8.1f}  {n}" for n in order]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("build", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 16, 64, 128, 256])
    parser.add_argument("--prefill", type=int, nargs="*", default=[8192])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--breakdown", action="store_true")
    args = parser.parse_args()
    if args.command == "build":
        build(args.folder, args.layers, args.decode, args.prefill, args.context)
        return 0
    config = FLASH.truncated(args.layers)
    print(f"{torch.cuda.get_device_name()}, {args.layers} layers, context {args.context}", flush=True)
    for folder in sorted(args.folder.iterdir(), key=lambda f: (f.name[:3], len(f.name), f.name)):
        with torch.no_grad():
            print(measure(folder, config, args.context, args.breakdown), flush=True)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
