"""How a command ends that cannot do what was asked: one line, and the traceback in a file, or with --debug printed."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import re2tal
from re2tal.files import write_atomically


def end(message: str, status: int, *, debug: bool = False) -> NoReturn:
    """Print the message and exit. The traceback of an exception at hand is kept or, with `debug`, printed.

    Where the message is not one of ours, the line names the file with the traceback too.
    """
    # Of one process the number would say nothing.
    rank = None if os.environ.get("WORLD_SIZE", "1") == "1" else os.environ.get("RANK")
    error = sys.exc_info()[1]
    if error is not None and debug:
        traceback.print_exception(error)
    # Where the keyboard stopped it tells nothing.
    elif isinstance(error, Exception) and (kept := _keep(error, rank)) and not (_is_ours(error) or of_a_file(error)):
        message = f"{message} (traceback in {kept}; --debug prints it)"
    print(f"re2tal{f' (rank {rank})' if rank else ''}: {message}", file=sys.stderr)
    sys.exit(status)


def of_a_file(error: BaseException) -> str | None:
    """What the system says of a file, such as "a.txt: No such file or directory"; None of other errors."""
    if not isinstance(error, OSError) or error.strerror is None or not isinstance(error.filename, str | os.PathLike):
        return None
    others = "" if error.filename2 is None else f" -> {error.filename2}"
    return f"{error.filename}{others}: {error.strerror}"


def _keep(error: BaseException, rank: str | None) -> Path | None:
    """The file with the last traceback of this user; None where it cannot be written, which is no fault."""
    # RuntimeError: of a user whom this container does not know, no home is known either.
    with suppress(OSError, RuntimeError):
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(base) / "re2tal" / f"last_error{f'_rank{rank}' if rank else ''}.txt"
        write_atomically(path, "".join(traceback.format_exception(error)))
        return path
    return None


def _is_ours(error: BaseException) -> bool:
    """Whether it was raised by a line of this package, and not by one that it called."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(Path(re2tal.__file__).parent)
