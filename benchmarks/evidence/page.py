"""docs/evidence.md from the parts' JSON files."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from evidence.cells import Part, read_part, table
from re2tal.files import write_atomically

HEAD = """\
# Evidence

The claims of the method, each measured by `python benchmarks/claims.py --part NAME`. This page is written by
that command from the JSON files in [evidence](evidence): edit those parts of the benchmark, not the page. What
has not been run has no figure here. Older figures and their log are in [results.md](results.md) and
[experiments.md](experiments.md).

Words: *average mAP* is over tIoU 0.3 to 0.7. *±* is a 95 % interval over seeds. Trainings start from random
weights unless a line says otherwise. *Hours* are the sum of a part's cells as they were measured, most of them
with other work on the same cores; `--jobs 2` measures two side by side. The whole form has never been run in
one go. Its aim, three hours on two cores, is missed: with three seeds the trainings alone take longer.
"""


FOOT = """\

## What this page does not show

- No part has run on a GPU or in its whole form; figures with one seed have no interval and settle nothing.
- Features that recognition trained first are cells of `features` only: there are no clips of URFD's actions.
- THUMOS14, ActivityNet and Kinetics: `re2tal reproduce` compares with their published scores, and says whether the
  interval of its own score over test videos holds them; it has run on stand-ins only.
"""


def write_page(out: Path, parts: Mapping[str, Part]) -> None:
    """OUT.md, and the pictures in OUT; a part without figures says that it has not been run.

    OUT/PART.txt holds remarks on the very figures in OUT, which somebody wrote who looked at them.
    """
    found = {name: read_part(out / f"{name}.json") for name in parts}
    times = {name: sum(cell["seconds"] for cell in cells.values()) / 3600 for name, cells in found.items()}
    rows = [(name, f"{times[name]:.1f}", str(len(cells))) for name, cells in found.items()]
    rows.append(("all", f"{sum(times.values()):.1f}", str(sum(map(len, found.values())))))
    lines = [HEAD, *table(("part", "hours", "cells done"), rows)]
    for name, part in parts.items():
        cells = found[name]
        lines += ["", f"## {name}: {part.title}", ""]
        if not cells:
            lines.append(f"Not run yet: `python benchmarks/claims.py --part {name}`.")
            continue
        lines += part.show({key: cell["figures"] for key, cell in cells.items()}, out)
        remarks = out / f"{name}.txt"
        if remarks.is_file():
            lines += ["", *remarks.read_text().splitlines()]
        lines += ["", *_circumstances(cells)]
    text = "\n".join(_narrow("\n".join([*lines, FOOT]).splitlines()))
    text = text.replace("(evidence)", f"({out.name})")
    # Keys and machines of cells that were measured long ago say so.
    text = re.sub(r"(?<![\d.])1 (epoch|core|thread)s\b", r"1 \1", text)
    write_atomically(out.with_suffix(".md"), text.rstrip() + "\n")


def _narrow(lines: Iterable[str]) -> Iterator[str]:
    """Wraps paragraphs and items of lists; headings, tables and code stay, and no two lines are empty."""
    in_code, paragraph, before = False, "", ""
    for line in [*lines, ""]:
        fence = line.startswith("```")
        if in_code or fence or not line or line.startswith(("|", "#", "!", "- ", "**", "Commands")):
            yield from _wrapped(paragraph)
            before, paragraph = (paragraph or before), ""
            in_code ^= fence
            if line.startswith("- "):
                paragraph = line
            elif line or (before and not in_code):
                yield line
                before = line
        else:
            paragraph = f"{paragraph} {line.strip()}".strip()


def _wrapped(paragraph: str) -> list[str]:
    indent = "  " * paragraph.startswith("- ")
    return textwrap.wrap(paragraph, 108, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def _circumstances(cells: Mapping[str, Mapping[str, object]]) -> list[str]:
    """When, where and how; each distinct value once."""

    def distinct(name: str) -> str:
        return "; ".join(dict.fromkeys(str(cell[name]) for cell in cells.values()))

    loads = [str(cell["machine"]).partition(", load ")[2].partition(",")[0] for cell in cells.values()]
    machines = dict.fromkeys(
        ",".join(part for part in str(cell["machine"]).split(",") if not part.startswith(" load "))
        for cell in cells.values()
    )
    seconds = sum(float(str(cell["seconds"])) for cell in cells.values())
    text = (
        f"Measured on {distinct('date')} in {seconds / 60:.0f} min; {'; '.join(machines)}; load when "
        f"a measurement ended: {min(map(float, loads)):g} to {max(map(float, loads)):g}."
    )
    commands = [f"`{command}`" for command in dict.fromkeys(str(cell["command"]) for cell in cells.values())]
    return [*textwrap.wrap(text, 108), "", "Commands: " + "\n".join(commands)]
