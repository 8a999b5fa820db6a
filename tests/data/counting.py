"""A generator for other processes, in a module that imports nothing."""

from collections.abc import Iterator


def count_up(number: int) -> Iterator[int]:
    """0 to number - 1; 0 divides by zero."""
    assert number or 1 / number
    yield from range(number)
