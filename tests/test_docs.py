"""The pages that people read: how wide they are, and that what they point to is there."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("shards/*.md")])
WIDTH = 110


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Line numbers and lines outside of code and tables."""
    in_code = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code and not line.lstrip().startswith("|"):
            yield number, line


def anchors(text: str) -> set[str]:
    """What GitHub lets links point to: headings in lower case, punctuation dropped, spaces as hyphens."""
    headings = (line.lstrip("#").strip().lower() for _, line in prose(text) if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_prose_are_narrow(page: Path) -> None:
    wide = [f"line {number}: {len(line)}" for number, line in prose(page.read_text()) if len(line) > WIDTH]
    assert wide == [], f"wrap these lines of {page.name} at {WIDTH} characters"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    lost = []
    for target in re.findall(r"(?:\]\(|^\[[^\]]+\]: )([^)\s]+)", page.read_text(), re.MULTILINE):
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        if "://" in target:
            continue
        if not found.exists() or (anchor and anchor not in anchors(found.read_text())):
            lost.append(target)
    assert lost == []


def test_the_checks_catch_a_wide_line_and_know_code_and_tables() -> None:
    text = "short\n```\ncode\n```\n| a | table |\n  | in a list |\nlast"
    assert [line for _, line in prose(text)] == ["short", "last"]
    assert anchors("# From plain (Kinetics) weights\n```\n# comment\n```\n## `index.jsonl`") == {
        "from-plain-kinetics-weights",
        "indexjsonl",
    }


def test_the_drawing_of_packages_is_what_the_code_imports() -> None:
    script = runpy.run_path(str(ROOT / "docs/draw_packages.py"))
    drawn = script["draw"](script["packages"](ROOT / "re2tal"))
    assert (ROOT / "docs/packages.svg").read_text() == drawn, "imports changed: run `python docs/draw_packages.py`"


@pytest.mark.slow
def test_the_drawing_of_a_step_is_what_is_counted() -> None:
    script = runpy.run_path(str(ROOT / "docs/draw_step.py"))
    assert (ROOT / "docs/memory_of_a_step.svg").read_text() == script["draw"](script["curves"]())
