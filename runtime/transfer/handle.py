"""What a prefill worker gives away so that somebody can pull a request's state: plain JSON, checked on arrival."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from dsv4c.errors import HandleError
from dsv4c.runtime.transfer.layout import Int64Array

VERSION = 1
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]


class Handle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A lease, as its reader knows it. It carries no time: each side counts its own.

    `at`: what the backend `kind` needs to open the peer. `columns`: of every group's page table in the peer's ledger.
    `tokens_sha256`: of the `target` tokens whose state this is.
    """

    kind: str
    peer: str
    row: Count
    lease: Count
    target: Count
    tokens_sha256: str
    columns: tuple[Count, ...]
    layout: str
    fields: dict[str, str]
    at: dict[str, Any]
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        out: dict[str, Any] = msgspec.to_builtins(self)
        return out

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Handle:
        """Raises HandleError that names the field at fault."""
        version = values.get("version") if isinstance(values, Mapping) else None
        if version != VERSION:
            raise HandleError(
                f"the handle has version {version!r}, this dsv4c reads {VERSION}",
                hint="run the same version of dsv4c in every role",
            )
        try:
            made = msgspec.convert(dict(values), cls)
        except msgspec.ValidationError as error:
            raise HandleError(f"the handle is malformed: {error}") from error
        if not (made.lease and made.target and all(made.columns)):
            raise HandleError("the handle is malformed: lease, target and columns must be positive")
        return made


def tokens_sha256(tokens: Int64Array) -> str:
    """What a handle says of its tokens: they are not told, only compared."""
    return hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()
