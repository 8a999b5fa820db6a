"""What is read from addresses, by way of the cache: a range, a file, and the description of a shard folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from re2tal.data.addresses.address import Address
from re2tal.data.addresses.cache import Cache, the_cache
from re2tal.data.addresses.remote import RemoteError, describe, fetch, read_range
from re2tal.data.contract.columns import columns_path
from re2tal.data.contract.manifest import INDEX_NAME, MANIFEST_NAME
from re2tal.files import sha256_of
from re2tal.video_ids import VIDEO_SUFFIXES

_UNUSED_SECONDS = 30 * 86400.0
"""Descriptions of folders that were not opened for so long are removed."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class CachedRange:
    """`count` bytes from byte `start` on, of a file of `file_bytes`; `version` changes with what should be there."""

    address: Address
    start: int
    count: int
    file_bytes: int
    version: object

    def read(self) -> bytes:
        """From the cache, or else the address. Raises RemoteError."""
        content = the_cache().read(self._key)
        if content is None:
            content = read_range(self.address, self.start, self.count, file_bytes=self.file_bytes)
            the_cache().write(self._key, content)
        return content

    def forget(self) -> None:
        """Take it out of the cache."""
        the_cache().remove(self._key)

    @property
    def _key(self) -> str:
        return self.address.key(self.start, self.count, self.file_bytes, self.version)


@dataclass(slots=True)
class LocalCopy:
    """A file from an address, here for as long as its context lasts."""

    path: Path
    _address: Address
    _cache: Cache

    def fetch(self) -> Iterator[float]:
        """Bring the file; gives the share of it that is here, again and again. Raises RemoteError."""
        found = describe(self._address)
        key = self._address.key(found.num_bytes, found.version)
        if found.version is not None and self._cache.take(key, self.path, num_bytes=found.num_bytes):
            return
        for done in fetch(self._address, self.path, found):
            yield done / found.num_bytes if found.num_bytes else 0.0
        if found.version is not None:
            self._cache.keep(key, self.path)


@contextmanager
def local_copy(address: Address) -> Iterator[LocalCopy]:
    """A place for the file of an address, emptied at the end."""
    cache = the_cache()
    suffix = Path(address.name).suffix.lower()
    with cache.folder() as folder:
        yield LocalCopy(folder / f"video{suffix if suffix in VIDEO_SUFFIXES else ''}", address, cache)


def mirror(address: Address) -> Path:
    """A folder on this machine with the manifest and the index of a shard folder at an address; no shard is in it.

    The manifest is fetched each time, the index once for each manifest. Raises RemoteError.
    """
    cache = the_cache()
    with cache.folder() as scratch:
        _fetch_whole(address / MANIFEST_NAME, scratch / MANIFEST_NAME)
        content = (scratch / MANIFEST_NAME).read_bytes()
        try:
            index_sha256 = json.loads(content)["index_sha256"]
        except (ValueError, KeyError, TypeError, RecursionError):
            index_sha256 = None
        if not isinstance(index_sha256, str) or not _SHA256.fullmatch(index_sha256):
            raise RemoteError(f"{address / MANIFEST_NAME} is no manifest of shards; check the address")
        folder = cache.root / "folders" / address.key(content)
        folder.parent.mkdir(exist_ok=True)
        # Ranks of one machine start together: one fetches, the others find it.
        with cache.alone(folder.name):
            if not folder.is_dir():
                _fetch_index(address, scratch, index_sha256)
                with suppress(OSError):  # without locks, another rank may have been faster
                    os.rename(scratch, folder)
                    scratch.mkdir()  # for the cache to remove
    # It was used: see the removal below.
    os.utime(folder)
    for other in folder.parent.iterdir():
        with suppress(OSError):
            if other.stat().st_mtime < time.time() - _UNUSED_SECONDS:
                shutil.rmtree(other)
    return folder


def _fetch_index(address: Address, into: Path, index_sha256: str) -> None:
    _fetch_whole(address / INDEX_NAME, into / INDEX_NAME)
    if sha256_of(into / INDEX_NAME) != index_sha256:
        raise RemoteError(
            f"{address / INDEX_NAME} is not the one that {MANIFEST_NAME} beside it was written for; copy the folder "
            "there again"
        )
    columns = columns_path(into, index_sha256)
    with suppress(RemoteError):  # a folder may lack it
        _fetch_whole(address / columns.name, columns)


def _fetch_whole(address: Address, path: Path) -> None:
    for _ in fetch(address, path, describe(address)):
        pass
