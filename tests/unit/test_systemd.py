"""The notify protocol, spoken to a real datagram socket."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sidecar_daemon.adapters.systemd import ServiceNotifier
from sidecar_daemon.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(params=["path", "abstract"])
def service_manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@sidecar-{uuid.uuid4()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address.replace("@", "\0"))
        receiver.settimeout(5)
        yield receiver, address


def test_every_notification_is_one_datagram(service_manager: tuple[socket.socket, str]) -> None:
    receiver, address = service_manager
    notifier = ServiceNotifier(address)
    assert notifier.usable
    steps: list[tuple[Callable[[], bool], bytes]] = [
        (lambda: notifier.ready("2 pipelines"), b"READY=1\nSTATUS=2 pipelines"),
        (notifier.ready, b"READY=1"),
        (lambda: notifier.status("first\nREADY=1 "), b"STATUS=first READY=1"),
        (lambda: notifier.status("\ud800"), b"STATUS=?"),
        (notifier.watchdog, b"WATCHDOG=1"),
        (lambda: notifier.extend_timeout(1.5), b"EXTEND_TIMEOUT_USEC=1500000"),
        (lambda: notifier.stopping("draining"), b"STOPPING=1\nSTATUS=draining"),
    ]
    for send, expected in steps:
        assert send()
        assert receiver.recv(4096) == expected


def test_an_empty_status_sends_nothing(service_manager: tuple[socket.socket, str]) -> None:
    receiver, address = service_manager
    assert not ServiceNotifier(address).status(" \n ")
    receiver.setblocking(False)
    with pytest.raises(BlockingIOError):
        receiver.recv(4096)


@pytest.mark.parametrize("address", [None, "", "vsock:2:1234", "relative/path"])
def test_without_a_socket_nothing_happens(address: str | None) -> None:
    notifier = ServiceNotifier(address)
    assert not notifier.usable
    assert not notifier.ready()


def test_a_dead_socket_is_no_error(tmp_path: Path) -> None:
    assert not ServiceNotifier(str(tmp_path / "nobody")).ready()


def test_a_full_socket_does_not_block(service_manager: tuple[socket.socket, str]) -> None:
    _, address = service_manager
    notifier = ServiceNotifier(address)
    assert not all(notifier.status("x" * 4096) for _ in range(10_000))


def test_the_unit_waits_longer_than_the_drain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("SIDECAR_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    unit = (Path(__file__).parents[2] / "systemd/sidecar-daemon.service").read_text()
    lines = dict(line.partition("=")[::2] for line in unit.splitlines() if "=" in line and not line.startswith("#"))
    assert lines["Type"] == "notify"
    assert lines["LoadCredential"].startswith("database_url:")
    assert float(lines["TimeoutStopSec"]) > Settings.read().worker.drain_seconds
