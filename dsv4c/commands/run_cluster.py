"""`dsv4c run` as several processes: the router in front of workers, or one of these workers."""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4c.commands.run import launch_options, serve_options, with_progress
from dsv4c.commands.settings import Setting
from dsv4c.errors import ConfigError

if TYPE_CHECKING:
    from dsv4c.artifact import Manifest
    from dsv4c.runtime.cluster.address import Address
    from dsv4c.runtime.cluster.processes import Child

_FROM_PARENT = "-"
"""`--secret-file` of a child: the secret comes through stdin, whose end is the parent's."""
_PASSED_ON = (
    "weights", "load-format", "seed", "tokenizer", "chat-release", "max-requests", "max-context", "kv-memory",
    "gpu-memory-utilization", "no-prefix-cache", "speculative-tokens", "executor", "debug-contracts", "shadow", "break",
    "budget-tokens", "lease-ttl", "transfer-timeout", "nixl-devices", "drain-timeout", "log-level", "log-format",
)  # fmt: skip
"""Options of the router's command line that its workers get."""


def run_router(args: argparse.Namespace, settings: Sequence[Setting], directory: Path) -> None:
    """Serves clients over workers, its own and those that join. Raises ConfigError for what makes no sense."""
    _check_router(args)
    # these import no torch: workers start while this process does
    from dsv4c.artifact import load_manifest
    from dsv4c.runtime.cluster.address import Address, listen, read_secret
    from dsv4c.runtime.cluster.processes import Processes

    manifest = load_manifest(directory)
    transfer = args.transfer or ("shm" if manifest.target == "cpu" else "nixl")
    secret = secrets.token_hex(32) if args.secret_file is None else read_secret(Path(args.secret_file)).decode()
    address = Address.parse(args.router_address or f"abstract:dsv4c-{secrets.token_hex(8)}")
    listener = listen(address)
    address = address.bound(listener)
    children = [] if transfer == "local" else _children(args, settings, directory, manifest, transfer, address)
    with Processes(children, secret) as processes:
        from dsv4c.launch_cluster import ClusterOptions, serve_local, serve_router
        from dsv4c.runtime.serve import bind

        options, serving = launch_options(args), serve_options(args)
        cluster = ClusterOptions(
            address, secret, args.prefill_workers, args.decode_workers, transfer, args.worker_timeout,
            args.budget_tokens, args.max_queue,
        )  # fmt: skip
        sock = bind(args.host, args.port)
        if transfer == "local":
            listener.close()
            serve_local(directory, options, serving, cluster, sock)
        else:
            serve_router(directory, options, serving, cluster, sock, listener, processes)


def run_worker(args: argparse.Namespace, directory: Path) -> None:
    """Serves a router, until one of both ends. Raises ConfigError for what makes no sense."""
    if args.prompt is not None or args.prefill_workers or args.decode_workers or args.router_address is not None:
        raise ConfigError("`--role` is for a worker of a router elsewhere", hint="give `--router` and `--secret-file`")
    for name in ("router", "secret-file"):
        if getattr(args, name.replace("-", "_")) is None:
            raise ConfigError(f"`--role` needs `--{name}`")
    from dsv4c.launch_cluster import WorkerOptions, launch_worker, serve_worker
    from dsv4c.runtime.cluster.address import Address, read_secret
    from dsv4c.runtime.cluster.processes import Parent

    parent = Parent() if args.secret_file == _FROM_PARENT else None
    secret = parent.secret if parent is not None else read_secret(Path(args.secret_file)).decode()
    name = args.worker_name or f"{args.role}-{socket.gethostname()}-{os.getpid()}"
    worker = WorkerOptions(
        args.role, name, Address.parse(args.router), secret, args.transfer, args.lease_ttl,
        args.transfer_timeout, args.nixl_devices, args.drain_timeout, args.log_level, args.log_format,
    )  # fmt: skip
    options = launch_options(args)
    launched = with_progress(partial(launch_worker, directory, options, worker), brief=parent is not None)
    serve_worker(launched, worker, parent)


def _check_router(args: argparse.Namespace) -> None:
    if args.prompt is not None:
        raise ConfigError("`--prompt` answers without workers", hint="leave out `--prefill-workers` and others")
    if args.router is not None or args.worker_name is not None:
        raise ConfigError("`--router` and `--worker-name` are for workers", hint="give `--role`")
    if args.router_address is None and not args.decode_workers:
        raise ConfigError(
            "prefill workers alone generate nothing", hint="give `--decode-workers`, or `--router-address` to join at"
        )
    if args.router_address is not None and args.secret_file is None:
        raise ConfigError("`--router-address` needs `--secret-file`", hint="only who knows the secret may join")
    if args.transfer == "local" and args.router_address is not None:
        raise ConfigError("`--transfer local` is for workers in one process", hint="use `shm` or `nixl`")


def _children(
    args: argparse.Namespace,
    settings: Sequence[Setting],
    directory: Path,
    manifest: Manifest,
    transfer: str,
    address: Address,
) -> list[Child]:
    """The worker processes that the options ask for."""
    from dsv4c.runtime.cluster.processes import Child

    count = args.prefill_workers + args.decode_workers
    given = {setting.option.name: setting for setting in settings}
    common = [sys.executable, "-m", "dsv4c.cli", "run", str(directory), "--config", os.devnull]
    common += ["--router", str(address), "--secret-file", _FROM_PARENT, "--transfer", transfer]
    for name in _PASSED_ON:
        common += _arguments(given[name])
    if manifest.target == "cpu":
        cores = len(os.sched_getaffinity(0))
        common += ["--threads", str(args.threads or max(1, cores // max(1, count)))]
    cards = 0 if manifest.target == "cpu" else _cards(count, args.gpu_memory_utilization)
    children: list[Child] = []
    for role, number in (("prefill", args.prefill_workers), ("decode", args.decode_workers)):
        for i in range(number):
            name = f"{role}-{i}"
            card = ["--device", str(len(children) % cards)] if cards else []
            children.append(Child(name, [*common, *card, "--role", role, "--worker-name", name]))
    return children


def _arguments(setting: Setting) -> list[str]:
    """What sets an option to the same on another command line."""
    option, value = setting.option, setting.value
    if value == option.initial:
        return []
    if option.flag:
        return [f"--{option.name}"]
    values = value if option.repeated else [value]
    return [part for one in values for part in (f"--{option.name}", str(one))]


def _cards(workers: int, utilization: float | None) -> int:
    """How many cards workers take in turn. Raises ConfigError if two would fill the same."""
    import torch

    cards = torch.cuda.device_count()
    if cards < workers and utilization is None:
        raise ConfigError(
            f"{workers} workers share {cards} GPUs, and each would fill its own",
            hint="give `--gpu-memory-utilization`, what one worker may fill",
        )
    return cards
