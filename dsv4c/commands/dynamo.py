"""`dsv4c dynamo`: serve an artifact as a worker of NVIDIA Dynamo."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsv4c.commands.dynamo_options import DYNAMO_OPTIONS
from dsv4c.commands.run import launch_options
from dsv4c.commands.run_options import FIXED
from dsv4c.commands.settings import add_options, namespace, print_settings, settle
from dsv4c.errors import ConfigError


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser("dynamo", help="serve an artifact as a worker of NVIDIA Dynamo")
    add_options(parser, DYNAMO_OPTIONS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until it is ended; 0 when done."""
    settings = settle(args, DYNAMO_OPTIONS, "dynamo", FIXED)
    args = argparse.Namespace(**vars(args) | vars(namespace(settings)))
    if args.artifact is None:
        raise ConfigError("which artifact?", hint="give its folder, or `artifact` in dsv4c.toml")
    if args.print_config:
        print(print_settings(settings, "dynamo", {}))
        return 0

    from dsv4c.launch import launch
    from dsv4c.launch_dynamo import DynamoOptions, serve_dynamo
    from dsv4c.runtime.dynamo.version import check_installed

    check_installed()
    directory = Path(args.artifact)
    options = launch_options(args)
    launched = launch(directory, options)
    print(f"ready: role {args.role}", file=sys.stderr)
    tokenizer = options.tokenizer or directory / "tokenizer"
    serve_dynamo(
        launched,
        tokenizer if tokenizer.is_dir() else tokenizer.parent,
        DynamoOptions(
            role=args.role,
            namespace=args.namespace,
            component=args.component,
            discovery=args.discovery_backend,
            request_plane=args.request_plane,
            event_plane=args.event_plane,
            kv_events=not args.no_kv_events,
            default_thinking=args.default_thinking,
            drain_s=args.drain_timeout,
            stream_interval=args.stream_interval,
            hand_over=args.hand_over,
            host=args.bootstrap_host,
            advertise=args.bootstrap_advertise,
            bootstrap_port=args.bootstrap_port,
            nixl_devices=args.nixl_devices,
            lease_ttl_s=args.lease_ttl,
            transfer_timeout_s=args.transfer_timeout,
        ),
    )
    return 0
