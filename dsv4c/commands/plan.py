"""`dsv4c plan`: how many requests fit in memory, and what binds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dsv4c.commands.arguments import not_negative, positive
from dsv4c.commands.terminal import console


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "plan", help="how many requests fit in memory, and what binds, before anything is loaded"
    )
    parser.add_argument("artifact", metavar="DIR", type=Path, help="the artifact's folder")
    parser.add_argument(
        "--gpu-memory", "--memory", dest="memory", metavar="SIZE",
        help="such as 141GB or 131GiB (default: this machine's card, or its memory for target cpu)",
    )  # fmt: skip
    parser.add_argument("--context", metavar="TOKENS", help="of every request, such as 128K (default: the artifact's)")
    parser.add_argument("--requests", type=positive, help="whether so many fit at once (default: as many as do)")
    parser.add_argument(
        "--snapshots", type=not_negative, help="of the prefix cache for a request (default: as in `run`)"
    )
    parser.add_argument("--gpu-memory-utilization", type=float, metavar="SHARE", help="of it to fill (default 0.92)")
    parser.add_argument("--json", action="store_true", help="the plan as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the memory plan; 0 when done."""
    from dsv4c.artifact import load_manifest
    from dsv4c.describe_memory import answer_of, memory_json, memory_tables
    from dsv4c.launch import SNAPSHOTS
    from dsv4c.room import given_room, measured_room, plan_of
    from dsv4c.units import parse_bytes, parse_tokens

    total = None if args.memory is None else parse_bytes(args.memory)
    manifest = load_manifest(args.artifact)
    plan, share = plan_of(args.artifact, manifest), args.gpu_memory_utilization
    room = measured_room(manifest.target, share) if total is None else given_room(manifest.target, total, share)
    context = plan.max_context if args.context is None else parse_tokens(args.context)
    snapshots = SNAPSHOTS if args.snapshots is None else args.snapshots
    fit = plan.fit(room, context, snapshots)
    requests = args.requests or max(1, fit.requests)
    longest = plan.longest(room, requests, snapshots)
    sizes = plan.sizes(requests, context, snapshots)
    if args.json:
        print(json.dumps(memory_json(plan, room, sizes, fit, longest), indent=1))
        return 0
    console().print(memory_tables(plan, room, sizes), answer_of(plan, room, fit, args.requests, longest))
    return 0
