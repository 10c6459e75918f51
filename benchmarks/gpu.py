"""Every op of DeepSeek-V4 on this machine's GPU: the selected schedule beside the limit, eager and compiled PyTorch.

usage: python benchmarks/gpu.py [--family hyper] [--label flash] [--rows benchmarks/gpu.jsonl]
       python benchmarks/gpu.py --build-only DIR        on a machine without a GPU; then --bundle DIR where the card is

One aligned line for each op and shape: microseconds of ours, of the limit (bytes over the copy bandwidth or flops over
the matrix rate, both measured in the same run), percent of it, and of the others: the reference run by PyTorch, by
torch.compile, and by other kernels where the workload names some. Medians over rotated inputs larger than the L2 cache.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dsv4c.errors import Dsv4cError
from dsv4c.runtime.gpu import check_card
from dsv4c.schedules._tuned import Row, Tuned, write_rows
from dsv4c.trial import Others
from dsv4c.tune import FAMILIES, build, measure

OTHERS = ("eager", "compile")


def lines(rows: Sequence[Row]) -> list[str]:
    """The table: the fastest row of each op and workload."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row.op, row.label)
        if key not in best or row.microseconds < best[key].microseconds:
            best[key] = row
    head = (
        f"{'op':28} {'shape':34} {'ours us':>9} {'limit us':>9} {'%':>4} {'eager':>9} {'compile':>9}  others; schedule"
    )
    out = [head]
    for (op, label), row in sorted(best.items()):
        us = {name: f"{row.baselines[name]:.1f}" if name in row.baselines else "-" for name in OTHERS}
        rest = ", ".join(f"{k} {v:.1f}" for k, v in sorted(row.baselines.items()) if k not in OTHERS)
        out.append(
            f"{op:28} {label:34} {row.microseconds:9.1f} {row.microseconds * row.limit:9.1f} {100 * row.limit:4.0f} "
            f"{us['eager']:>9} {us['compile']:>9}  {rest + '; ' if rest else ''}{row.schedule}"
        )
    return out


def _others() -> Others:
    """TileKernels, where it is installed."""
    if importlib.util.find_spec("tile_kernels") is None:
        return {}
    sys.path.insert(0, str(Path(__file__).parent))
    module = importlib.import_module("tile_kernels_baselines")
    return {op: {"tile-kernels": make} for op, make in module.BASELINES.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", action="append", choices=FAMILIES)
    parser.add_argument("--label", default="", help="only workloads whose label contains this")
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--build-only", type=Path, metavar="DIR")
    parser.add_argument("--bundle", type=Path, metavar="DIR")
    parser.add_argument("--rows", type=Path, help="write the rows here")
    args = parser.parse_args()
    if args.build_only is None:
        check_card(args.arch, 0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.bundle or args.build_only or Path(scratch)
        if args.bundle is None:
            build(
                args.family or FAMILIES, folder, Path("build/.tune-cache"), args.arch, extra=("tile",),
                keep=lambda w: args.label in w.label and "bench" in w.purpose, tuned=Tuned.of(args.arch),
            )  # fmt: skip
        if args.build_only is not None:
            return 0
        rows = measure(folder, None, baselines=True, others=_others())
    if args.rows is not None:
        write_rows(args.rows, rows)
    print("\n".join(lines(rows)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Dsv4cError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
