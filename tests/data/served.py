"""A web server on this machine whose faults are chosen by the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


@dataclass
class Server:
    """What is served, how, and what was asked."""

    files: dict[str, bytes]
    address: str = ""
    ranges: bool = True
    etag: str | None = "1"
    statuses: list[int] = field(default_factory=list)
    """Answers to the next GETs, instead of content."""
    shift: int = 0
    """Ranges begin so many bytes too early, and say so."""
    head_bytes: int | None = None
    """What answers to HEAD say of the length, instead of the truth."""
    says_length: bool = True
    """Else an answer ends where the connection does."""
    is_chunked: bool = False
    """An answer without a length comes in pieces that have one, the last of them empty."""
    cuts: int = 0
    """So many of the next answers end early."""
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, range)"""

    def gets(self) -> list[tuple[str, str | None]]:
        """(path, range) of the GETs."""
        return [one[1:] for one in self.asked if one[0] == "GET"]

    def add(self, folder: Path, under: str) -> None:
        """Serve all files of a folder."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.files[f"/{under}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()


@contextmanager
def served(files: dict[str, bytes] | None = None) -> Iterator[Server]:
    """A running server."""
    server = Server(files or {})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            wanted = self.headers.get("Range")
            server.asked.append((self.command, self.path, wanted))
            content = server.files.get(unquote(self.path.partition("?")[0]))
            status = 200 if content is not None else 404
            if body and server.statuses:
                status = server.statuses.pop(0)
            whole, part = content or b"", content or b""
            if status == 200 and wanted and server.ranges:
                first, last = (int(one) for one in wanted.removeprefix("bytes=").split("-"))
                shift = min(first, server.shift)
                first, last = first - shift, last - shift
                part, status = whole[first : last + 1], 206
            part = part if status < 300 else b""
            self.send_response(status)
            is_wrong = not body and server.head_bytes is not None
            if server.says_length:
                self.send_header("Content-Length", str(server.head_bytes if is_wrong else len(part)))
            elif server.is_chunked:
                self.send_header("Transfer-Encoding", "Chunked")
                part = b"%x\r\n%b\r\n0\r\n\r\n" % (len(part), part)
            else:
                self.close_connection = True
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(whole)}")
            if self.path.endswith(".html"):
                self.send_header("Content-Type", "text/html; charset=utf-8")
            if server.etag:
                self.send_header("ETag", f'"{server.etag}"')
            self.end_headers()
            if body and part:
                if server.cuts:
                    server.cuts -= 1
                    part = part[: len(part) // 2]
                    self.close_connection = True
                try:
                    self.wfile.write(part)
                except ConnectionError:  # who asked has seen enough
                    self.close_connection = True

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    server.address = f"http://127.0.0.1:{running.server_address[1]}"
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        running.shutdown()
        running.server_close()
        thread.join()
