"""JSON that came from elsewhere, read without surprises.

`json.loads` takes NaN and Infinity, lets the last of two equal keys win, and dies of deep nesting with a
RecursionError. Here each of these is a ValueError that names the file.
"""

from __future__ import annotations

import gc
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from re2tal.files import write_atomically

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
MAX_BYTES = 1 << 30
"""Ten million predictions fit; parsed, a file of this size takes about 10 GB of memory."""


def read_json(path: Path | str, *, max_bytes: int = MAX_BYTES) -> Any:
    """The parsed file; UTF-8, UTF-16 and UTF-32 are recognised, with or without a byte order mark.

    Raises FileNotFoundError, and ValueError for a file that is not strict JSON: syntax, NaN or Infinity, a repeated
    key, nesting beyond the interpreter's stack, or more than `max_bytes`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; check the path")
    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(f"{path} has {size} bytes, more than the limit of {max_bytes}; split it or pass max_bytes")
    try:
        with _collector_at_rest():
            return json.loads(path.read_bytes(), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError(
            f"{path} is not usable JSON: nested too deeply; no format read here nests more than 6"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not usable JSON: {error}") from error


def write_json(path: Path | str, document: Any) -> None:
    """Write `document` as one line of JSON, atomically; ValueError if it holds NaN or infinity."""
    write_atomically(path, json.dumps(document, allow_nan=False) + "\n")


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """A document makes no cycles, and the collector would walk the whole of it again and again while it grows: a
    million predictions take three times as long."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def brief(value: Any) -> str:
    """A value as an error message shows it: on one line, its beginning if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def finite_number(value: Any) -> float | None:
    """A finite number, also one written as a string; None for anything else."""
    # True is an int in Python, and "1_000" and "nan" are numbers.
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) is None:
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is not a number in JSON; replace it with a finite number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {repeated!r} appears twice in one object; keep one")
    return mapping
