"""What was read from addresses, kept on this machine up to so many bytes; the oldest use goes first.

Ranks and workers share the folder. Files appear whole or not at all, and are renewed by their use.
"""

from __future__ import annotations

import os
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

FOLDER, LIMIT = "RE2TAL_CACHE", "RE2TAL_CACHE_GB"
"""Environment variables: where, and how much."""
DEFAULT_GB = 20.0
_LEFT_SECONDS = 7 * 86400.0
"""A file that is not finished, or a folder in use, is one of a process that was killed when it is so old."""


class Cache:
    """Files by key, at most `max_bytes` of them; one that is larger than an eighth of it is not kept."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root = root
        self._kept, self._scratch = root / "kept", root / "in-use"
        self._max_bytes = max_bytes
        self._added: int | None = None  # bytes since the last look at the folder; None: none yet
        for folder in (self._kept, self._scratch):
            # For this user alone: it holds what was read with this user's credentials.
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def read(self, key: str) -> bytes | None:
        """What `write` was given; None where it is not there, or not as it was."""
        path = self._kept / key
        try:
            content = path.read_bytes()
            # The time of the last use, by which `_sweep` chooses. File systems seldom keep one themselves.
            os.utime(path)
        except OSError:
            return None
        body, checksum = content[:-4], content[-4:]
        if zlib.crc32(body).to_bytes(4, "little") == checksum:
            return body
        self.remove(key)
        return None

    def remove(self, key: str) -> None:
        """Keep this no longer."""
        (self._kept / key).unlink(missing_ok=True)

    def write(self, key: str, content: bytes) -> None:
        """Keep `content` where there is space for it."""
        if not self._make_space(len(content) + 4):
            return
        temporary = self._scratch / f"{key}.{os.getpid()}"
        try:
            temporary.write_bytes(content + zlib.crc32(content).to_bytes(4, "little"))
            os.replace(temporary, self._kept / key)
        except OSError:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder for one use, on the same disk."""
        with TemporaryDirectory(dir=self._scratch) as folder:
            yield Path(folder)

    @contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """No other process of this machine is in this context at the same time, where there are locks."""
        with (self._scratch / f"{key}.lock").open("w") as file:
            with suppress(ImportError, OSError):
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def take(self, key: str, path: Path, *, num_bytes: int | None) -> bool:
        """Make the file that was kept as `key` appear as `path`, where it stays; False where it is not there."""
        kept = self._kept / key
        try:
            os.utime(kept)
            os.link(kept, path)
        except OSError:
            return False
        if num_bytes is None or path.stat().st_size == num_bytes:
            return True
        path.unlink()
        self.remove(key)
        return False

    def keep(self, key: str, path: Path) -> None:
        """Keep a file of `folder`."""
        if self._make_space(path.stat().st_size):
            with suppress(OSError):
                os.link(path, self._kept / key)

    def _make_space(self, num_bytes: int) -> bool:
        """Whether so many bytes may be added. The folder is looked through after every 64th of the limit that this
        process adds, and a quarter of it is then left free: room for 16 processes."""
        if num_bytes > self._max_bytes // 8:
            return False
        if self._added is None or self._added + num_bytes > self._max_bytes // 64:
            self._sweep(self._max_bytes * 3 // 4 - num_bytes)
            self._added = 0
        self._added += num_bytes
        return True

    def _sweep(self, most: int) -> None:
        files = []
        for entry in os.scandir(self._kept):
            with suppress(OSError):  # another process has removed it
                status = entry.stat(follow_symlinks=False)
                files.append((status.st_mtime_ns, status.st_size, entry.path))
        left = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if left <= most:
                break
            Path(path).unlink(missing_ok=True)
            left -= size
        for entry in os.scandir(self._scratch):
            with suppress(OSError):
                if entry.stat(follow_symlinks=False).st_mtime < time.time() - _LEFT_SECONDS:
                    shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)


_opened: dict[tuple[str | None, str | None, int], Cache] = {}


def the_cache() -> Cache:
    """This process's view of the cache that RE2TAL_CACHE and RE2TAL_CACHE_GB name.

    ValueError where one of them cannot be used.
    """
    # With the process's number: a forked worker counts what it adds itself.
    given = os.environ.get(FOLDER), os.environ.get(LIMIT), os.getpid()
    if given not in _opened:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "re2tal"
        try:
            gigabytes = float(given[1] or DEFAULT_GB)
            if not 0 <= gigabytes < float("inf"):
                raise ValueError
        except ValueError:
            raise ValueError(f"{LIMIT} is {given[1]!r}; give a number of gigabytes, 0 to keep nothing") from None
        root = Path(given[0]) if given[0] else home
        try:
            _opened[given] = Cache(root, int(gigabytes * 1e9))
        except OSError as error:
            raise ValueError(
                f"{root}, the cache for videos from other machines, cannot be written ({error.strerror}); set {FOLDER} "
                "to a folder that can"
            ) from None
    return _opened[given]
