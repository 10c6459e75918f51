"""Links: proof of the secret on both sides, frames, and all ways in which they end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue

import pytest

from dsv4c.errors import ConfigError, InputError, LinkError
from dsv4c.runtime.cluster.address import Address, read_secret
from dsv4c.runtime.cluster.link import Link, Port, dial, pair

SECRET = b"a secret of some length"


@pytest.fixture(params=["127.0.0.1:0", "unix", "abstract"])
def port(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Port, Queue[Link]]]:
    texts = {"unix": f"unix:{tmp_path}/router.sock", "abstract": f"abstract:dsv4c-test-{tmp_path.name}-{id(tmp_path)}"}
    accepted: Queue[Link] = Queue()
    opened = Port(Address.parse(texts.get(request.param, request.param)), SECRET, accepted.put).start()
    yield opened, accepted
    opened.close()


def test_frames_arrive_whole_and_in_order(port: tuple[Port, Queue[Link]]) -> None:
    opened, accepted = port
    ours = dial(opened.address, SECRET)
    theirs = accepted.get(timeout=10)
    frames = [bytes([i]) * (7**i % 300_000) for i in range(12)]
    for frame in frames:
        ours.send(frame)
        theirs.send(lambda frame=frame: frame[:100])  # type: ignore[misc]
    assert [theirs.receive() for _ in frames] == frames
    assert [ours.receive() for _ in frames] == [frame[:100] for frame in frames]
    ours.finish(10)
    with pytest.raises(LinkError):
        theirs.receive()
    with pytest.raises(LinkError):
        ours.receive()
    assert ours.closed
    ours.send(b"lost")
    theirs.close()


def test_another_secret_opens_nothing(port: tuple[Port, Queue[Link]]) -> None:
    opened, accepted = port
    with pytest.raises(ConfigError, match="another secret"):
        dial(opened.address, SECRET + b"?")
    link = dial(opened.address, SECRET)  # others are not disturbed
    assert accepted.get(timeout=10) is not None and accepted.empty()
    link.close()


def test_who_says_nothing_holds_up_nobody(port: tuple[Port, Queue[Link]]) -> None:
    opened, accepted = port
    silent = opened.address.connect(5)
    garbage = opened.address.connect(5)
    garbage.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
    link = dial(opened.address, SECRET)
    assert accepted.get(timeout=10) is not None
    for sock in (silent, garbage):
        sock.close()
    link.close()


def test_a_router_with_another_secret_is_not_trusted() -> None:
    """A worker tells nothing to who cannot prove the secret in turn."""
    server = socket.create_server(("127.0.0.1", 0))

    def pretend() -> None:
        sock, _ = server.accept()
        sock.sendall(b"x" * 32)
        sock.recv(64)
        sock.sendall(b"y" * 32)

    thread = threading.Thread(target=pretend)
    thread.start()
    with pytest.raises(ConfigError, match="another secret"):
        dial(Address("127.0.0.1", server.getsockname()[1]), SECRET)
    thread.join()
    server.close()


def test_a_frame_that_is_too_large_ends_the_link() -> None:
    ours, theirs = pair()
    ours._socket.sendall((2**32 - 1).to_bytes(4, "big"))
    with pytest.raises(LinkError, match="larger than"):
        theirs.receive()
    ours.close()
    theirs.close()


def test_a_frame_cut_short_is_none() -> None:
    ours, theirs = pair()
    ours._socket.sendall((100).to_bytes(4, "big") + b"half")
    ours.close()
    with pytest.raises(LinkError, match="closed"):
        theirs.receive()


def test_nobody_answers(tmp_path: Path) -> None:
    for text in (f"unix:{tmp_path}/none", "abstract:dsv4c-none-such", "127.0.0.1:1"):
        with pytest.raises(LinkError, match="no router answers"):
            dial(Address.parse(text), SECRET)


def test_a_socket_left_behind_is_removed_and_one_in_use_is_not(tmp_path: Path) -> None:
    address = Address.parse(f"unix:{tmp_path}/router.sock")
    left = socket.socket(socket.AF_UNIX)
    left.bind(address.name)
    left.close()  # as a crash leaves it
    opened = Port(address, SECRET, lambda link: link.close()).start()
    assert Path(address.name).stat().st_mode & 0o077 == 0
    with pytest.raises(InputError, match="in use"):
        Port(address, SECRET, lambda link: link.close())
    opened.close()
    assert not Path(address.name).exists()


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="in use"):
        Port(Address("127.0.0.1", taken.getsockname()[1]), SECRET, lambda link: link.close())


@pytest.mark.parametrize("text", ["", "7500", "host:", ":7500", "host:port", "host:70000", "unix:", "abstract:"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="no address"):
        Address.parse(text)


@pytest.mark.parametrize("text", ["127.0.0.1:7500", "[::1]:7500", "unix:/run/x.sock", "abstract:name"])
def test_addresses_are_written_as_they_are_read(text: str) -> None:
    assert str(Address.parse(text)) == text
    assert Address.parse(text).on_this_machine
    assert not Address.parse("0.0.0.0:7500").on_this_machine


def test_secrets_of_files(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    with pytest.raises(ConfigError, match="cannot read"):
        read_secret(file)
    file.touch(0o600)
    file.write_text("short\n")
    with pytest.raises(ConfigError, match="shorter"):
        read_secret(file)
    file.write_text("long enough to be one\n")
    assert read_secret(file) == b"long enough to be one"
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="others"):
        read_secret(file)
