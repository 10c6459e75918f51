"""Every route of the server. An endpoint is one file with `add(app, server)`, and one line here."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI

from dsv4c.runtime.endpoints import chat, completions, health, messages, models, page, responses, tokens
from dsv4c.runtime.server import Server

ENDPOINTS: tuple[Callable[[FastAPI, Server], None], ...] = (
    models.add,
    completions.add,
    chat.add,
    responses.add,
    messages.add,
    tokens.add,
    health.add,
    page.add,
)
