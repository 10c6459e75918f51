"""What the matrix kernels for Blackwell are made of, read off their machine code: no card is at hand, so no times.

usage: python benchmarks/blackwell_code.py [--arch sm_103a] [--op experts_mx] [--columns 16] [--rows FILE]

One line a kernel of flash: its roles of warps, products of the loop that issues them, all instructions there for each
of them, copies of scales into tensor memory, registers, threads, shared memory, columns of tensor memory, bytes of a
thread in local memory. Where warps have roles each has loops of its own; what is counted is the shortest with products.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import triton

from dsv4c.schedules._gpu import Request, compile_launch
from dsv4c.schedules._launch import TritonLaunch
from dsv4c.schedules._schedule import Config, OpNode, Schedule, Value, apply_layout
from dsv4c.schedules.audit import read
from dsv4c.schedules.blackwell import experts, linear
from dsv4c.schedules.workloads.experts import node
from dsv4c.schedules.workloads.linear import shapes

TOKENS = {16: 64, 32: 256, 64: 2048, 128: 8192}
"""Columns of the experts' tiles, and tokens that get them."""
MAPS = {"wo_b": (16, 64, 8192), "wo_a": (64,), "csa_compress": (8192,), "gate": (64,)}
"""Linear maps and numbers of tokens."""
_PRODUCT = re.compile(r"\bUTC[HQOI]MMA\b")


def nvfp4(plain: OpNode) -> OpNode:
    """The op of an NVFP4 checkpoint."""
    inputs = list(plain.inputs[:3])
    for data in (3, 5, 7):
        weight = plain.inputs[data]
        assert weight is not None
        count, lines, width = (int(size) for size in weight.shape)
        inputs += [
            weight,
            Value((count, lines, width // 8), "float8_e4m3fn", "weight"),
            Value((count,), "float32", "weight"),
        ]
    inputs += [Value((1,), "float32", "weight"), inputs[-1], plain.inputs[-1]]
    return OpNode("experts_nvfp4", {**plain.attrs, "activations": "nvfp4"}, tuple(inputs), plain.outputs)


def candidates(arch: str) -> Iterator[tuple[str, OpNode, Schedule, Config]]:
    """(name, node, schedule, config) of every kernel that is looked at."""
    known = {s.op: s for s in (*experts.schedules(arch), *linear.schedules(arch))}
    plain = node("flash")
    formats = {
        fmt: dataclasses.replace(plain, op="experts_mx", attrs={**plain.attrs, "activations": fmt})
        for fmt in ("mxfp8", "mxfp4")
    }  # fmt: skip
    for fmt, what in {**formats, "nvfp4": nvfp4(plain), "bf16": plain}.items():
        for columns, tokens in TOKENS.items():
            found = known[what.op].space(what, {"T": tokens})
            config = next((one for one in found if one["columns"] == columns), None)
            if config is not None:
                yield fmt, what, known[what.op], config
    for shape in shapes("flash"):
        for tokens in MAPS.get(shape.name, ()):
            what = shape.node()
            yield shape.name, what, known[what.op], known[what.op].space(what, {"T": tokens})[0]


def loop(image: bytes) -> tuple[int, int, int]:
    """Of the shortest loop with products: products, instructions, copies of scales (UTCCP)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        text = subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label.group(1)] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction.group(1))
    best = (0, len(code), 0)
    for end, instruction in enumerate(code):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction)
        if target is None or labels.get(target.group(1), end + 1) > end:
            continue
        body = code[labels[target.group(1)] : end + 1]
        products = sum(bool(_PRODUCT.search(one)) for one in body)
        if products and len(body) < best[1]:
            best = (products, len(body), sum("UTCCP" in one for one in body))
    return best


def row(
    name: str, what: OpNode, config: Config, launch: TritonLaunch, values: list[Value | None], arch: str
) -> dict[str, Any]:
    made = compile_launch(Request(what.describe(), launch, tuple(values), arch), Path("build/.tune-cache"))
    code, (products, instructions, copies) = read(made.image), loop(made.image)
    return {
        "op": what.op, "name": name, "kernel": launch.kernel.partition(":")[2], "columns": config["columns"],
        "roles": launch.constants["ROLES"], "products": products,
        "each": round(instructions / products, 1) if products else None, "utccp": copies, "registers": code.registers,
        "threads": made.record.threads, "shared": made.record.shared, "tensor": code.columns, "local": code.local,
    }  # fmt: skip


def _line(found: Mapping[str, Any]) -> str:
    size = f"{found['registers']} x {found['threads']}"
    return (
        f"{found['op']:20} {found['name']:14} {found['kernel']:13} {found['columns']:4} {found['roles']:>5} "
        f"{found['products']:8} {found['each']!s:>5} {found['utccp']:5} {size:>14} {found['shared']:7} "
        f"{found['tensor']!s:>6} {found['local']:5}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", default="sm_103a", choices=("sm_100a", "sm_103a"))
    parser.add_argument("--op", default="", help="only ops whose name contains this")
    parser.add_argument("--columns", type=int, help="only tiles of so many columns")
    parser.add_argument("--rows", type=Path, help="write the rows here")
    args = parser.parse_args()
    rows = []
    print(
        f"{'op':20} {'what':14} {'kernel':13} {'cols':>4} {'roles':>5} {'products':>8} {'each':>5} {'utccp':>5} "
        f"{'regs x threads':>14} {'shared':>7} {'tensor':>6} {'local':>5}"
    )
    for name, what, schedule, config in candidates(args.arch):
        if args.op not in what.op or args.columns not in (None, config["columns"]):
            continue
        values = [*what.inputs, *schedule.workspace(what, config), *what.outputs]
        for i, transforms in schedule.layouts(what).items():
            value = values[i]
            assert value is not None
            values[i] = apply_layout(value, transforms)
        for launch in schedule.build(what, config).launches:
            if isinstance(launch, TritonLaunch) and "ROLES" in launch.constants:
                found = row(name, what, config, launch, values, args.arch)
                rows.append(found)
                print(_line(found), flush=True)
    if args.rows is not None:
        args.rows.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
