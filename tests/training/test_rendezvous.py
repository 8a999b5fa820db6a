"""Ranks meet at rank 0's store and nowhere else."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from distributed.ranks import free_port

from re2tal.distributed import World
from re2tal.training import rendezvous
from re2tal.training.process_group import _why_not_joined


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(rendezvous, "ANSWER_SECONDS", 1.0)


@pytest.fixture(params=[b"", b"HTTP/1.0 400 Bad Request\r\n\r\n"], ids=["silent", "a web server"])
def foreign(request) -> Iterator[int]:
    """The port of a program that accepts connections and is no store."""
    listener, held = socket.create_server(("127.0.0.1", 0)), []

    def serve() -> None:
        while True:
            try:
                held.append(listener.accept()[0])
                held[-1].sendall(request.param)
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    yield listener.getsockname()[1]
    listener.close()
    for connection in held:
        connection.close()


def test_a_foreign_listener_is_told_from_a_store(foreign):
    world = World(rank=1, world_size=2, master_port=foreign)
    with pytest.raises(ConnectionError, match=rf"listens at 127.0.0.1:{foreign}, but it is not rank 0 of this run"):
        rendezvous.refuse_foreign_listener(world, timeout_seconds=20)


def test_a_store_is_met_and_its_absence_is_said():
    port = free_port()
    world = World(rank=1, world_size=2, master_port=port)
    with pytest.raises(ConnectionError, match=f"rank 1 of 2 could not reach rank 0 at 127.0.0.1:{port} for 0.1 s"):
        rendezvous.refuse_foreign_listener(world, timeout_seconds=0.1)
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    rendezvous.refuse_foreign_listener(world, timeout_seconds=20)
    del store


def test_an_interface_that_is_missing_is_named_and_the_port_is_not_blamed(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    world = World(world_size=2, master_port=free_port())
    reason = "[enforce fail at gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find address for: eth77"
    said = _why_not_joined(world, reason)
    assert "GLOO_SOCKET_IFNAME names 'eth77'; set it to one of ['lo'" in said
    assert str(world.master_port) not in said
    assert "port" not in said.replace("transport", "")
    assert f"127.0.0.1:{world.master_port}" in _why_not_joined(world, "EADDRINUSE: address already in use")
