"""TileLang's pairs of blocks on a CPU: the lowered CUDA text of a kernel, run by the cluster of `cluster.hpp`.

    python -m tests.schedules.blackwell.emulate_pairs COUNT

What is compiled here is what nvcc is given, but for three lines' spelling (shared variables) and the includes.
"""

from __future__ import annotations

import ctypes
import random
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dsv4c.schedules._launch import TileLaunch
from dsv4c.schedules._schedule import Value
from dsv4c.schedules._tilelang import Lowered, evaluate, lower

FACTORY = "dsv4c.schedules.tilelang.linear_scaled:scaled"
_HEADER = Path(__file__).with_name("cluster.hpp")


def launch(n: int, k: int, clusters: int, beside: int, stages: int, slots: int) -> TileLaunch:
    """The map of [T, k] by [n, k] on `clusters` pairs of blocks."""
    constants = {"N": n, "K": k, "CLUSTERS": clusters, "G": beside, "stages": stages, "slots": slots}
    return TileLaunch(FACTORY, (0, 1, 2, 3, 4), constants, (2 * clusters, 1, 1), 256, {"M": "a0_0"})


def values(n: int, k: int) -> tuple[Value, ...]:
    """Its arguments: tokens, their scales, weight, its scales, results."""
    return (
        Value(("T", k), "float8_e4m3fn"), Value(("T", k // 128), "float32"), Value((n, k), "float8_e4m3fn", "weight"),
        Value((n // 128, k // 128), "float8_e8m0fnu", "weight"), Value(("T", n), "bfloat16"),
    )  # fmt: skip


def spelt(source: str) -> str:
    """CUDA text as the emulated cluster takes it."""
    source = re.sub(r"(?m)^#.*\n", "", source)
    source = re.sub(r"extern __shared__ .*? buf_dyn_shmem\[\];", "uchar* buf_dyn_shmem = emu::dynamic();", source)
    return re.sub(r"__shared__ __align__\(16\) (\w+) (\w+)\[(\d+)\];", r'\1* \2 = emu::variable<\1>("\2", \3);', source)


def program(lowered: Lowered) -> str:
    """The text with an entry that makes its parameters from the launch record."""
    widths = {"uint8": 1, "bfloat16": 2}
    params = []
    for arg in lowered.args:
        if arg.map is not None:
            m = arg.map
            # sizes in tokens are the entry's T
            sizes = ", ".join("T" if size == "a0_0" else str(size) for size in m.sizes)
            params.append(
                f"CUtensorMap{{(char*)args[{arg.arg}], {{{sizes}}}, {m.strides[0]}, "
                f"{{{m.box[0]}, {m.box[1]}}}, {widths[m.dtype]}, {m.swizzle}}}"
            )
        elif arg.kind == "ptr":
            params.append(f"({'const float*' if arg.arg == 1 else 'const uchar*'})args[{arg.arg}]")
        else:
            assert arg.value == "a0_0"
            params.append("(int)T")
    names = ", ".join(f"p{i}" for i in range(len(params)))
    made = "".join(f"  const auto p{i} = {text};\n" for i, text in enumerate(params))
    return (
        f'#include "{_HEADER}"\n{spelt(lowered.source)}\n'
        f'extern "C" bool entry(void** args, long T, int clusters, unsigned seed) {{\n{made}'
        f"  return emu::run(clusters, {lowered.shared}, seed, [=] {{ {lowered.symbol}({names}); }});\n}}\n"
    )


class Emulated:
    """One kernel on the CPU."""

    def __init__(self, n: int, k: int, clusters: int, beside: int = 1, stages: int = 6, slots: int = 2) -> None:
        self.n, self.k, self.clusters = n, k, clusters
        lowered = lower(launch(n, k, clusters, beside, stages, slots), values(n, k), "sm_103a")
        assert lowered.cluster == (2, 1, 1) and [evaluate(size, {}) for size in lowered.grid] == [2 * clusters, 1, 1]
        with TemporaryDirectory() as folder:
            text, library = Path(folder) / "kernel.cc", Path(folder) / "kernel.so"
            text.write_text(program(lowered), encoding="utf-8")
            flags = ["-std=c++20", "-O1", "-w", "-fwrapv", "-fno-strict-aliasing", "-shared", "-fPIC"]
            subprocess.run(["g++", *flags, str(text), "-o", str(library)], check=True)
            self._entry = ctypes.CDLL(str(library)).entry
        self._entry.restype = ctypes.c_bool

    def __call__(self, *tensors: torch.Tensor, seed: int) -> torch.Tensor:
        """bf16 [T, n] of tokens, scales, weight and its scales; RuntimeError if its threads wait for ever."""
        out = torch.full((tensors[0].shape[0], self.n), torch.nan, dtype=torch.bfloat16)
        args = (ctypes.c_void_p * 5)(*(tensor.data_ptr() for tensor in (*tensors, out)))
        if not self._entry(args, ctypes.c_long(out.shape[0]), self.clusters, ctypes.c_uint(seed)):
            raise RuntimeError("the emulated kernel's threads wait for each other for ever")
        return out


def wrong(out: torch.Tensor, x: torch.Tensor, xs: torch.Tensor, w: torch.Tensor, ws: torch.Tensor) -> int:
    """How many results are further from the float64 sum than one rounding to bf16 and float32 sums may bring them."""
    left = x.double() * xs.double().repeat_interleave(128, 1)
    right = w.double() * torch.exp2(ws.double() - 127).repeat_interleave(128, 0).repeat_interleave(128, 1)
    exact, size = left @ right.T, left.abs() @ right.abs().T
    bound = exact.abs() * 2**-8 + size * 2**-20 + 2**-133
    return int((~((out.double() - exact).abs() <= bound)).sum())


def case(tokens: int, n: int, k: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Any E4M3 numbers, a scale of its own for every 128 channels of a token and block of the weight."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(rows: int) -> torch.Tensor:
        bits = torch.randint(0, 256, (rows, k), generator=generator, dtype=torch.uint8)
        return torch.where(bits & 127 == 127, bits - 1, bits).view(torch.float8_e4m3fn)  # no NaN

    xs = torch.exp2(torch.randint(-20, 21, (tokens, k // 128), generator=generator).float())
    ws = torch.randint(107, 148, (n // 128, k // 128), generator=generator, dtype=torch.uint8)
    return numbers(tokens), xs, numbers(n), ws


SHAPES = ((256, 512, 1, 1), (512, 1024, 1, 2), (512, 512, 3, 1), (768, 1536, 2, 3))  # n, k, clusters, beside


def main(count: int) -> None:
    generator = random.Random(5)
    kernels = [Emulated(*shape) for shape in SHAPES] + [Emulated(256, 1024, 1, stages=2, slots=1)]
    for seed in range(count):
        kernel = kernels[seed % len(kernels)]
        tokens = generator.choice((1, 127, 128, 129, 255, 256, 257, 300, 512, 600))
        tensors = case(tokens, kernel.n, kernel.k, seed)
        bad = wrong(kernel(*tensors, seed=seed), *tensors)
        print(f"{seed}: {tokens} x {kernel.n} x {kernel.k}, {kernel.clusters} pairs: {bad} wrong", flush=True)
        assert not bad
    print(f"{count} cases, none wrong")


if __name__ == "__main__":
    main(int(sys.argv[1]))
