"""What a prefill worker tells the decode worker that goes on with a request, by either of Dynamo's two ways.

    completed   the router waits for the prefill's one answer, and puts its `disaggregated_params` into the decode
                request: Granted and Prefilled together
    bootstrap   the router sends both requests at once, with the same room: the decode worker connects to the prefill
                worker (rendezvous.py) and is told Granted when pages are there, Prefilled when the first token is

So with bootstrap the pages move while the prompt is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from dsv4c.errors import HandleError, RequestError
from dsv4c.runtime.transfer.node import Granted, Prefilled

VERSION = 1


@dataclass(frozen=True)
class Bootstrap:
    """Where the decode worker meets the prefill worker."""

    host: str
    port: int
    room: int


def to_params(granted: Granted, prefilled: Prefilled) -> dict[str, Any]:
    """`disaggregated_params` of a prefill's answer: JSON values."""
    return {"version": VERSION, "handle": dict(granted.handle), "first": msgspec.to_builtins(prefilled)}


def refusal_params(error: RequestError) -> dict[str, Any]:
    """The same of a request at fault: its client is to hear it, and from a prefill worker would hear of a 500 alone."""
    return {"version": VERSION, "refused": error.message}


def read_params(request: Mapping[str, Any]) -> tuple[Granted, Prefilled] | None:
    """What a prefill worker has handed over with a decode request; None if there was none.

    Raises HandleError, and RequestError (400) for what the prefill worker has refused.
    """
    result = request.get("prefill_result")
    params = result.get("disaggregated_params") if isinstance(result, Mapping) else None
    if not params:
        return None
    if isinstance(params, Mapping) and isinstance(params.get("refused"), str):
        raise RequestError(params["refused"])
    handle = params.get("handle") if isinstance(params, Mapping) else None
    if not isinstance(handle, Mapping) or params.get("version") != VERSION:
        raise HandleError("the prefill worker's answer is not understood", hint="run the same dsv4c in every role")
    try:
        return Granted(dict(handle)), msgspec.convert(params.get("first"), Prefilled)
    except msgspec.ValidationError as error:
        raise HandleError(f"the prefill worker's answer is malformed: {error}") from error


def read_bootstrap(request: Mapping[str, Any]) -> Bootstrap | None:
    """Where to meet, if the router has said so. Raises HandleError."""
    info = request.get("bootstrap_info")
    if not info:
        return None
    try:
        return Bootstrap(str(info["bootstrap_host"]), int(info["bootstrap_port"]), int(info["bootstrap_room"]))
    except (KeyError, TypeError, ValueError) as error:
        raise HandleError(f"`bootstrap_info` is malformed: {error}") from error
