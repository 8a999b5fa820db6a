"""Files that appear whole or not at all, the paths that a user gives for them, and their checksums."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO


def write_atomically(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8, atomically; folders above it are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(text.encode())


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to be written, which becomes `path` at the end: a reader sees all of it or nothing, after an error too."""
    if is_stream(path):
        number = _descriptor(path)
        # A file that is there for it would be opened from its beginning, and what was printed, and will be, overwrite
        # the document.
        with path.open("wb") if number is None else os.fdopen(os.dup(number), "wb") as file:
            yield file
        return
    # The process's number, because several may write the same file, and each has to rename its own.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            # Before the rename, or a power cut could leave the final name on an empty file.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def output_file(path: Path, *, option: str) -> Path:
    """The file to write for a path that a user names: there or not yet, in a folder that may have to be made, or what
    a link leads to, which stays a link; a pipe or a device is written to.

    To be called before the work, so that it does not end in an error. ValueError for a folder, and where nothing can be
    written.
    """
    target = linked(path)
    try:
        if target.is_dir():
            raise ValueError(f"{option} is {path}, a folder; give the name of a file")
        if is_stream(target):
            _check_stream(target)
        else:
            # A link that leads nowhere counts as there: no folder can be made in its place.
            folder = next(one for one in target.absolute().parents if os.path.lexists(one))
            with TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise ValueError(f"{option} is {path}, and cannot be written: {error.strerror}; give another place") from None
    return target


def _check_stream(path: Path) -> None:
    number = _descriptor(path)
    if number is not None:
        os.write(number, b"")  # nothing, but an error where it is closed, or open for reading
    elif not os.access(path, os.W_OK):
        fault = errno.EACCES if path.exists() else errno.ENOENT  # a device is not made by writing
        raise OSError(fault, os.strerror(fault))


def linked(path: Path) -> Path:
    """What a link leads to, which need not exist; other paths as they are."""
    return Path(os.path.realpath(path)) if path.is_symlink() and not is_stream(path) else path


def is_stream(path: Path) -> bool:
    """A pipe, a terminal, /dev/null: what a rename would put a file in the place of."""
    # /dev/stdout may lead to a file, which its other writer has open.
    return path.parent in (Path("/dev"), Path("/dev/fd")) or (
        path.exists() and not path.is_file() and not path.is_dir()
    )


def is_stdout(path: Path | str) -> bool:
    """Whether what is printed goes there too."""
    return _descriptor(Path(path)) == 1


def _descriptor(path: Path) -> int | None:
    """The number of an open file that a path names; None of other paths."""
    number = str({"/dev/stdout": 1, "/dev/stderr": 2}.get(str(path), path.name))
    return int(number) if path.parent in (Path("/dev"), Path("/dev/fd")) and number.isdecimal() else None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
