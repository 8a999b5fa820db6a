"""A worker process as the stream starts them, that answers; in a module of its own, so that spawned ones find it."""

from __future__ import annotations

from multiprocessing.connection import Connection

from re2tal.data.streaming.workers import heed_only_the_parent


def ready_worker(connection: Connection) -> None:
    """Says that it is ready, then sends back what it is sent."""
    heed_only_the_parent(0)
    connection.send("ready")
    while True:
        connection.send(connection.recv())
