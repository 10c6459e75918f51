"""Where workers come in: who says the right things is taken, listened to until its link ends, and lost then."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from dsv4c.errors import EngineError, LinkError
from dsv4c.runtime.cluster import wire
from dsv4c.runtime.cluster.link import Link
from dsv4c.runtime.cluster.router import Router


class Reception:
    """`serve` is what a Port does with a link that has proven itself."""

    def __init__(self, router: Router, layout: Mapping[str, str]) -> None:
        """`layout`: the fields of the layout of the router's artifact, which a worker must have too.

        What the router does not know of it, its weights, the first worker says, for as long as there is any.
        """
        self._router = router
        self._layout = layout
        self._said: dict[str, str] = {}

    def serve(self, link: Link) -> None:
        """Serves one worker until its link ends."""
        log = logging.getLogger("dsv4c")
        member, reason = None, ""
        try:
            hello = wire.decode_for_router(link.receive())
            if not isinstance(hello, wire.Hello):
                raise LinkError("a worker did not introduce itself")
            refusal = self.refusal(hello)
            if refusal is not None:
                log.warning("worker `%s` was turned away: %s", hello.name, refusal.message)
                link.send(wire.encode(refusal))
                link.finish(self._router.policy.silence_s)
                return
            member = self._router.join(hello, link)
            while True:
                self._router.handle(member, wire.decode_for_router(link.receive()))
        except LinkError as error:
            reason = error.message
            if member is None:
                log.warning("a worker was turned away: %s", reason)
        except Exception as error:
            reason = f"the router stopped: {type(error).__name__}: {error}"
            self._router.fail(EngineError(reason, hint="restart the server"))
            raise
        finally:
            if member is not None:
                self._router.lose(member, reason)
            link.close()

    def refusal(self, hello: wire.Hello) -> wire.Refused | None:
        """Why a worker is not taken, or None: what its artifact has must be what the router's has."""
        if hello.version != wire.VERSION:
            hint = "run the same dsv4c on both sides"
            return wire.Refused(f"the worker speaks version {hello.version}, the router {wire.VERSION}", hint)
        if not self._router.members:
            self._said = {name: value for name, value in hello.layout.items() if name not in self._layout}
        expected = {**self._layout, **self._said}
        for name in dict.fromkeys((*expected, *hello.layout)):
            ours, theirs = expected.get(name, "nothing"), hello.layout.get(name, "nothing")
            if ours != theirs:
                whose = "other workers'" if name in self._said else "the router's"
                message = f"`{name}` of the worker's artifact is {theirs[:16]}, of {whose} {ours[:16]}"
                return wire.Refused(message, "give all of them the same artifact, and the same weights")
        return None
