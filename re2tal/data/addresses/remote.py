"""Bytes from an address: one range of a file, or a file whole, with patience for what passes by itself.

Everything goes through fsspec's file systems, which take credentials from where their own tools keep them.
"""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from re2tal.data.addresses.address import SCHEMES, Address

T = TypeVar("T")

TRIES = 4
FIRST_WAIT_SECONDS = 1.0
CONNECT_SECONDS, SILENT_SECONDS = 15, 30
"""No connection, or no byte, for so long counts as a failure. All tries together take less than data.clips'
timeout_seconds, after which a worker counts as lost."""
CHUNK = 8 << 20
"""Bytes of a file that are asked for at once; what came before a failure is kept."""

_PASSING = frozenset({408, 425, 429})
"""Statuses below 500 that another try may not meet again."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_TRACES: list[Any] = []
"""What looks at each answer of the web: one object, since fsspec keeps a file system for each set of options."""
_REMEDIES = {
    401: "it wants credentials, see docs/own_data.md",
    403: "these credentials, or none, give no access; see docs/own_data.md",
    404: "check the address",
    410: "check the address",
    412: "it changed while it was read; try again",
}


class RemoteError(OSError):
    """An address that cannot be read: which one, the status of the answer, and what to do."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class NoRanges(RemoteError):
    """A server that sends files only whole."""


@dataclass(frozen=True, slots=True)
class Described:
    """What a server says of a file."""

    num_bytes: int | None
    """None where it does not say."""
    version: str | None
    """Changes with the content; None where there is nothing that would."""
    is_page: bool = False
    """It is HTML."""


def describe(address: Address) -> Described:
    """Ask for a file's size and version. Raises RemoteError."""

    def ask(system: Any) -> Described:
        # fsspec remembers what it listed, for the whole life of the process.
        system.invalidate_cache()
        info = system.info(_path(address))
        if info.get("type") == "directory":
            raise FileNotFoundError(404)
        names = ("ETag", "etag", "generation", "md5Hash", "blob_id", "Content-MD5", "Last-Modified", "LastModified")
        version = next((str(info[name]) for name in names if info.get(name)), None)
        return Described(info.get("size"), version, str(info.get("mimetype", "")).startswith("text/html"))

    return _patiently(address, ask)


def read_range(address: Address, start: int, count: int, *, file_bytes: int) -> bytes:
    """`count` bytes from byte `start` on, of a file of `file_bytes`. Raises RemoteError, NoRanges among them."""

    def read(system: Any) -> bytes:
        # With its size the file is opened without another question to the server.
        asked = {"trace_request_ctx": _Asked(address, start, file_bytes)} if address.is_web else {}
        with system.open(_path(address), "rb", size=file_bytes, cache_type="none", **asked) as file:
            file.seek(start)
            content = file.read(count)
        if len(content) != count:
            raise ConnectionError(f"{len(content)} of {count} bytes came")
        return content

    return _patiently(address, read)


@dataclass(frozen=True, slots=True)
class _Asked:
    address: Address
    start: int
    file_bytes: int


async def _check_answer(_: object, context: Any, params: Any) -> None:
    """fsspec takes any part that comes as the one it asked for, though the answer says which one it is."""
    asked, headers = context.trace_request_ctx, params.response.headers
    is_endless = "Content-Length" not in headers and "chunked" not in headers.get("Transfer-Encoding", "").lower()
    if isinstance(asked, Address) and params.response.status == 200 and is_endless:
        raise RemoteError(
            f"{asked}: the server does not say how long the file is, so a part of it would pass for the whole; copy it "
            "to this machine, or to a server that says the length"
        )
    said = headers.get("Content-Range", "")
    if not isinstance(asked, _Asked) or not (match := _CONTENT_RANGE.match(said)):
        return
    if match[2] not in ("*", str(asked.file_bytes)):
        raise RemoteError(
            f"{asked.address} has {match[2]} bytes, and {asked.file_bytes} were expected: it was changed, or the "
            "server says wrong sizes; try again, or copy the file to this machine"
        )
    if int(match[1]) != asked.start and params.response.status == 206:
        raise RemoteError(
            f"{asked.address}: the server sent bytes from {match[1]} on, asked for those from {asked.start} on; copy "
            "the file to this machine"
        )


def fetch(address: Address, path: Path, before: Described) -> Iterator[int]:
    """Write a file to `path`; gives how many bytes there are, again and again. Raises RemoteError.

    A file that is another one at the end than it was `before` is an error too.
    """
    if before.is_page:
        raise RemoteError(f"{address} is a web page; give the address of the file itself")
    free = shutil.disk_usage(path.parent).free
    if (before.num_bytes or 0) > free:
        raise RemoteError(
            f"{address} has {before.num_bytes} bytes, and {path.parent} {free} free; make space, or set RE2TAL_CACHE "
            "to another folder"
        )
    with path.open("wb") as file:
        try:
            if before.num_bytes is None:
                raise NoRanges("")
            while file.tell() < before.num_bytes:
                count = min(CHUNK, before.num_bytes - file.tell())
                file.write(read_range(address, file.tell(), count, file_bytes=before.num_bytes))
                yield file.tell()
        except NoRanges:
            yield from _fetch_in_one(address, file, most=before.num_bytes if before.num_bytes is not None else free)
        done = file.tell()
    if done != (before.num_bytes if before.num_bytes is not None else done) or describe(address) != before:
        raise RemoteError(f"{address} changed while it was read; try again")


def _fetch_in_one(address: Address, file: Any, *, most: int) -> Iterator[int]:
    """Where the server gives no ranges, a failure costs all that came before it."""
    for number in range(TRIES):
        file.seek(0)
        file.truncate()
        try:
            asked = {"trace_request_ctx": address} if address.is_web else {}
            # A block size of 0 streams: no range is asked for.
            with _system(address).open(_path(address), "rb", block_size=0, **asked) as remote:
                while content := remote.read(CHUNK):
                    file.write(content)
                    yield file.tell()
                    if file.tell() > most:
                        raise RemoteError(f"{address} has more than {most} bytes; make space, or try again")
            return
        except Exception as error:
            _wait_or_raise(address, error, number)


def list_folder(address: Address, *, recursive: bool) -> list[Address]:
    """The files in a folder of a bucket or a data set, by name, with `recursive` those in its folders too; of a file
    itself. Raises RemoteError."""

    def ask(system: Any) -> list[str]:
        system.invalidate_cache()
        return system.find(_path(address).rstrip("/"), maxdepth=None if recursive else 1)

    return [Address(f"{address.scheme}://{name.lstrip('/')}") for name in sorted(_patiently(address, ask))]


def check_ranges(address: Address, *, file_bytes: int) -> None:
    """RemoteError where a file is not there, has another size, or can only be read whole."""
    found = describe(address).num_bytes
    if found is not None and found != file_bytes:
        raise RemoteError(
            f"{address} has {found} bytes, the manifest says {file_bytes}: it was cut or changed; copy it there again"
        )
    # The last byte, which only a server that answers ranges sends alone.
    read_range(address, file_bytes - 1, 1, file_bytes=file_bytes)


def _patiently(address: Address, work: Callable[[Any], T]) -> T:
    check_library(address)
    for number in range(TRIES):
        try:
            return work(_system(address))
        except Exception as error:
            _wait_or_raise(address, error, number)
    raise AssertionError("the last try returns or raises")


def _wait_or_raise(address: Address, error: Exception, number: int) -> None:
    """After try `number`: waits where another one may go well, else raises RemoteError without what may be secret."""
    for known in (error, error.__cause__):  # fsspec hides what it meets
        if isinstance(known, RemoteError):
            raise known from None
    if isinstance(error, ValueError) and "range requests" in str(error):
        raise NoRanges(
            f"{address}: the server sends files only whole, so that videos cannot be read out of a shard there; copy "
            "the shards to this machine, or to a server that answers range requests"
        ) from None
    if isinstance(error, ValueError):
        raise RemoteError(f"{address} cannot be opened ({type(error).__name__}); check the address") from None
    status = _status(error)
    may_pass = status is None or status in _PASSING or status >= 500
    if may_pass and number + 1 < TRIES:
        # Not all ranks at the same moment.
        # A generator of its own, as the draws of the global one belong to the training.
        time.sleep(FIRST_WAIT_SECONDS * 2**number * random.Random().uniform(0.75, 1.25))
        return
    if status is None:
        cause = error.__cause__ if isinstance(error, FileNotFoundError) else error  # fsspec's word for all that fails
        what = f"no answer, or one that ended early ({type(cause).__name__}), {TRIES} times"
        raise RemoteError(f"{address}: {what}; check the address and the network, or try again later") from None
    remedy = _REMEDIES.get(status, "the server fails; try again later" if status >= 500 else "check the address")
    raise RemoteError(f"{address}: status {status}; {remedy}", status=status) from None


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error stands for; None where no answer came."""
    seen: BaseException | None = error
    # What aiohttp says of an answer that breaks off has a code of 400, which no server gave.
    while seen is not None and type(seen).__module__ != "aiohttp.http_exceptions":
        code = getattr(seen, "status", None) or getattr(getattr(seen, "response", None), "status_code", None)
        code = code or getattr(seen, "code", None)
        if isinstance(code, int | str) and str(code).isdigit() and 400 <= int(code) < 600:
            return int(code)
        seen = seen.__cause__
    if isinstance(error, PermissionError):
        return 403
    if isinstance(error, FileNotFoundError) and error.__cause__ is None:
        return 404
    return None


def _path(address: Address) -> str:
    """As the file system takes it."""
    return address.url if address.is_web else address.url.partition("://")[2]


def _system(address: Address) -> Any:
    """The file system, one for each process."""
    options: dict[str, Any] = {}
    if address.is_web:
        import aiohttp

        if not _TRACES:
            _TRACES.append(aiohttp.TraceConfig())
            _TRACES[0].on_request_end.append(_check_answer)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
        # trust_env: proxies, and ~/.netrc. identity: the bytes of the file, not of a compressed copy of it.
        options = {
            "client_kwargs": {"timeout": timeout, "trust_env": True, "trace_configs": _TRACES},
            "headers": {"Accept-Encoding": "identity"},
        }
    elif address.scheme == "s3":
        options = {"config_kwargs": {"connect_timeout": CONNECT_SECONDS, "read_timeout": SILENT_SECONDS}}
    return fsspec.filesystem(address.scheme, **options)


def check_library(address: Address) -> None:
    """ValueError where the library that reads such addresses is not installed."""
    try:
        fsspec.get_filesystem_class(address.scheme)
    except ImportError:
        package = SCHEMES[address.scheme] or "re2tal again"
        raise ValueError(f"{address}: {address.scheme} addresses need another library; pip install {package}") from None
