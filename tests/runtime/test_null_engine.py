"""What benchmarks/server.py measures with: an engine that computes nothing serves every kind of stream to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.server import KINDS, MODEL, TEXT, NullEngine, drain_streams
from dsv4c.chat.codec import ChatCodec
from tests.runtime.live import start


def test_every_kind_of_stream_ends(nano_dir: Path) -> None:
    codec = ChatCodec.from_folder(nano_dir)
    engine: Any = NullEngine(codec.encode(TEXT), step_s=0.0)
    live = start(engine, codec, MODEL)
    try:
        for path, body in KINDS.values():
            asked = {"model": MODEL, "stream": True, "max_tokens": 40, **body}
            assert drain_streams(live.address[1], path, asked, 3) > 3 * 40 * 50
        assert engine.generated == len(KINDS) * 3 * 40 and engine.idle
    finally:
        live.close()
