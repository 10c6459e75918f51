"""`/`: a playground for a browser. Three static files of ours, which load nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.responses import Response

from dsv4c.runtime.server import Server

FOLDER = Path(__file__).resolve().parent.parent / "page"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def add(app: FastAPI, server: Server) -> None:
    """Adds the routes, unless the server has no page."""
    for path, (name, kind) in _FILES.items() if server.operations.page else ():
        _add_file(app, path, (FOLDER / name).read_bytes(), kind)


def _add_file(app: FastAPI, path: str, data: bytes, kind: str) -> None:
    @app.get(path, include_in_schema=False)
    async def file() -> Response:
        return Response(data, media_type=kind, headers=_HEADERS)
