"""One text table for all that print one."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], *, align: str, rules: Sequence[int] = ()) -> str:
    """Cells in columns, two spaces apart, no spaces at the ends of lines.

    `align` has one of "<" (left) and ">" (right) per column; the last holds for the columns that follow. A rule of
    hyphens, as wide as the widest line, stands before each row whose index is in `rules` (negative: from the end).
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = align.ljust(len(widths), align[-1])[: len(widths)]
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]
    before = {index % len(rows) for index in rules}
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join(text for i, line in enumerate(lines) for text in ([rule, line] if i in before else [line]))
