"""The servers of tests/runtime, for clients."""

from tests.runtime.conftest import nano_server, toy_server

__all__ = ["nano_server", "toy_server"]
