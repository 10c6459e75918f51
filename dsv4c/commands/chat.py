"""`dsv4c chat`: talk to a server in the terminal."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from dsv4c.commands.arguments import client_key, positive, server_url


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser("chat", help="talk to a server in the terminal")
    parser.add_argument("--base-url", type=server_url, default="http://127.0.0.1:8000", help="default %(default)s")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--thinking", action="store_true", help="think before answering; shown dimmed")
    parser.add_argument("--temperature", type=float, help="default: the server's")
    parser.add_argument("--max-tokens", type=positive, help="of an answer (default: as many as the context holds)")
    parser.add_argument("--prompt", help="ask this once and leave")
    parser.add_argument("--api-key-file", type=Path, help="its first key is sent")
    parser.add_argument("--no-colour", action="store_true", help="no colours (nor where stdout is no terminal)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Talks until the end of input; 0."""
    from dsv4c.client.talk import Talk, converse
    from dsv4c.client.wire import Server, served_model

    server = Server(args.base_url, client_key(args.api_key_file))

    async def ask_model() -> str:
        async with server.session(30.0) as session:
            return await served_model(session, server)

    model = args.model or asyncio.run(ask_model())
    given = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    fields = {name: value for name, value in given.items() if value is not None}
    colour = sys.stdout.isatty() and not args.no_colour
    talk = Talk(server, model, sys.stdout, colour, args.system, args.thinking, fields)
    if args.prompt is not None:
        asyncio.run(talk.answer(args.prompt))
        return 0
    if sys.stdin.isatty():
        import readline

        readline.set_history_length(1000)
        print(f"{model} at {server.url}; /help says more", file=sys.stderr)
    converse(talk, input if sys.stdin.isatty() else _piped)
    return 0


def _piped(_prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
