"""Loading on a card: bandwidth from disk and from the page cache, memory beside the weights, and every bit compared.

usage: python benchmarks/loading.py FOLDER [--preset flash] [--layers 2] [--device cuda:0] [--sweep] [--skip-compare]

Writes a dummy checkpoint of the preset's first layers to FOLDER (3.4 GB a layer of `flash`, and 2.1 GB), once. Then
loads it as an artifact for Hopper would: cold (its pages dropped from the cache) and warm, beside the bandwidth of one
thread reading the same files and of one pinned copy. Compares all weights with those laid out on the CPU, loads a
damaged copy, which must be refused with its name, and makes dummy weights. Needs no compiled artifact.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsv4c.checkpoint.dummy import DummySource
from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.compile import Options, lower, plan_artifact
from dsv4c.config import ModelConfig, Target, preset
from dsv4c.errors import CheckpointError
from dsv4c.runtime.dummy import make_weights
from dsv4c.runtime.weights import CARD, ReadAhead, load_weights, staging_bytes

MIB = 1 << 20


def write(folder: Path, config: ModelConfig) -> None:
    """A checkpoint of dummy tensors as they are stored, a file a layer."""
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    source = DummySource(config)
    files: dict[str, list[str]] = {}
    for name in source.names():
        words = name.split(".")
        if words[0] != "mtp":
            part = f"layer-{int(words[1]):03d}" if words[0] == "layers" else words[0]
            files.setdefault(f"model-{part}.safetensors", []).append(name)
    for file, names in files.items():
        print(f"writing {file}", file=sys.stderr)
        save_file({name: source.raw(name) for name in names}, folder / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def shards(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Drops the files from the page cache."""
    for path in shards(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(folder: Path) -> float:
    """GB/s of one thread that reads the files into one buffer."""
    buffer, count, began = bytearray(32 * MIB), 0, time.perf_counter()
    for path in shards(folder):
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(buffer):
                count += got
    return count / (time.perf_counter() - began) / 1e9


def pinned_copy(device: torch.device) -> float:
    """GB/s of copies of one pinned buffer."""
    host = torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=True)
    card = torch.empty_like(host, device=device)
    card.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        card.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    return 20 * host.numel() / (time.perf_counter() - began) / 1e9


class Damaged(Checkpoint):
    """One expert's scales are read as 2^128."""

    def read(self, name: str, start: int, into: Tensor) -> None:
        super().read(name, start, into)
        if name == "layers.0.ffn.experts.3.w2.scale":
            into.fill_(255)


def load(manifest: Any, source: Any, device: torch.device, ahead: ReadAhead | None, label: str) -> dict[str, Tensor]:
    """Loads and prints the rate and, on a card, the memory that loading took beside the weights."""
    beside = ""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    out, report = load_weights(manifest.weights, source, None, device, ahead)
    if device.type == "cuda":
        kept = torch.cuda.memory_allocated(device) - before
        peak = torch.cuda.max_memory_allocated(device) - before - kept
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        bound = staging_bytes(manifest)
        beside = (
            f"; beside {kept / 1e9:.2f} GB: {peak / MIB:.0f} MiB at most, of {bound / MIB:.0f}; then {idle / MIB:.0f}"
        )
        if ahead is None and peak > bound:
            raise SystemExit(f"loading took {peak} bytes, `staging_bytes` promises {bound}")
    print(f"{label:28} {report}{beside}", flush=True)
    return out


def compare(manifest: Any, source: Checkpoint, got: dict[str, Tensor]) -> None:
    began = time.perf_counter()
    for weight in manifest.weights:  # one at a time: the host need not hold them all
        expected = load_weights([weight], source)[0][weight.name]
        found = got[weight.name].cpu()
        same = expected.dtype == found.dtype and expected.shape == found.shape
        if not same or not torch.equal(expected.view(torch.uint8), found.view(torch.uint8)):
            raise SystemExit(f"`{weight.name}` differs from what the CPU makes of it")
    print(f"{len(got)} weights equal the CPU's, compared in {time.perf_counter() - began:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="flash")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda:0"))
    parser.add_argument("--sweep", action="store_true", help="other units, buffers and readers")
    parser.add_argument("--skip-compare", action="store_true")
    args = parser.parse_args()
    config, device = preset(args.preset).truncated(args.layers), args.device
    options = Options(max_tokens=1, max_requests=1)
    plan = plan_artifact(lower(config, options, arch="sm_90a"), Target("sm_90a"), options)
    weights = tuple(plan.weights[name] for name in sorted(plan.weights))
    manifest = SimpleNamespace(weights=weights, model=config.to_dict(), target="sm_90a")
    write(args.folder, config)
    if device.type == "cuda":
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {os.cpu_count()} CPUs")
        print(f"{'one pinned copy':28} {pinned_copy(device):.1f} GB/s")
    forget(args.folder)
    print(f"{'one thread reads, cold':28} {plain_read(args.folder):.1f} GB/s")
    print(f"{'one thread reads, warm':28} {plain_read(args.folder):.1f} GB/s")
    forget(args.folder)
    got = load(manifest, Checkpoint(args.folder), device, None, "cold, first")
    for label in ("warm", "warm again"):
        got = {}
        got = load(manifest, Checkpoint(args.folder), device, None, label)
    if not args.skip_compare:
        compare(manifest, Checkpoint(args.folder), got)
    got = {}
    if args.sweep:
        for unit, readers in ((8, 4), (16, 4), (64, 4), (32, 1), (32, 2), (32, 8), (32, 12)):
            ahead = ReadAhead(unit * MIB, readers + CARD.buffers - CARD.readers, readers)
            load(manifest, Checkpoint(args.folder), device, ahead, f"warm, {unit} MiB, {readers} readers")
    try:
        load_weights(manifest.weights, Damaged(args.folder), None, device)
    except CheckpointError as error:
        print(f"damaged: {error.message}")
    else:
        raise SystemExit("a damaged checkpoint was loaded")
    for _ in range(2):
        made, report = make_weights(manifest, 0, device=device)
        print(f"{'dummy weights':28} {report}")
    for name, tensor in made.items():
        if tensor.dtype == torch.float8_e4m3fn:
            bad = bool((tensor.view(torch.uint8) & 0x7F == 0x7F).any())
        else:
            bad = tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
        if bad:
            raise SystemExit(f"dummy weight `{name}` holds values that are no numbers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
