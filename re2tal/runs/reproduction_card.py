"""The card of a reproduction: what was checked, trained and scored, beside what was published. Markdown and JSON."""

from __future__ import annotations

import platform
import shlex
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import re2tal
from re2tal.evaluation.resampling import LEVEL
from re2tal.files import write_atomically
from re2tal.machine import installed_version
from re2tal.runs.evaluation import Evaluated
from re2tal.runs.published import AVERAGE, Published, PublishedScore
from re2tal.runs.reproduction_checks import Checked
from re2tal.strict_json import write_json
from re2tal.tables import text_table

WIDTH = 110
DRAWS = 1000
"""Of test videos, for the intervals."""
PACKAGES = ("torch", "deepspeed", "numpy", "transformers")


@dataclass(slots=True)
class Card:
    """Fills up as the reproduction goes on; `str()` is its text so far."""

    dataset: str
    tiny: bool
    published: Published
    facts: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """By what was checked."""
    problems: list[str] = field(default_factory=list)
    scored: Evaluated | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)
    """Of the training."""

    def add(self, name: str, checked: Checked) -> None:
        """The outcome of a check."""
        self.facts[name] = checked.facts
        self.problems += checked.problems

    def compare(self, scored: Evaluated, summary: Mapping[str, Any]) -> None:
        """The scores of the trained network, with their spread."""
        self.scored, self.summary = scored, summary

    def rows(self) -> list[dict[str, Any]]:
        """Published scores beside those that were reached, in percent; None before the training.

        "interval" is that of the score reached here, and "inside" says whether it holds the published one.
        """
        return [
            {"source": one.source, "tiou": one.tiou, "published": one.percent, **self._reached(one)}
            for one in self.published.scores
        ]

    def _reached(self, one: PublishedScore) -> dict[str, Any]:
        if self.scored is None:
            return dict.fromkeys(("here", "difference", "interval", "inside"))
        scored = self.scored
        assert scored.spread is not None
        reached = 100 * (scored.average_map if one.tiou == AVERAGE else scored.precision.map_by_tiou[one.tiou])
        interval = scored.spread.intervals()[one.tiou]
        low, high = 100 * interval.low, 100 * interval.high
        inside = low <= one.percent <= high
        return {"here": reached, "difference": reached - one.percent, "interval": [low, high], "inside": inside}

    def verdicts(self) -> str:
        """The comparison as a table, and what it is worth."""
        head = "published by", "tIoU", "published, %", "here, %", "difference", f"{100 * LEVEL:.0f} % interval"
        rows = [(*head, "holds the published")]
        for row in self.rows():
            here: tuple[str, ...] = ("not trained", "", "", "")
            if row["here"] is not None:
                low, high = row["interval"]
                inside = "yes" if row["inside"] else "no"
                here = f"{row['here']:.2f}", f"{row['difference']:+.2f}", f"[{low:.2f}, {high:.2f}]", inside
            rows.append((row["source"], row["tiou"], f"{row['published']:.2f}", *here))
        lines = [text_table(rows, align="<<>>>>>", rules=(1,))]
        if self.scored is not None:
            lines += [
                f"the interval is of the score here, over draws of the test videos ({DRAWS} of them, bootstrap);",
                "one seed was trained: how far seeds differ is in no interval here, and the published scores give none",
            ]
        if self.tiny:
            lines.append("a tiny network in place of the published one: the comparison only rehearses the real one")
        elif self.problems:
            lines.append(f"not comparable as it stands: {len(self.problems)} problems are listed")
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for name, facts in self.facts.items():
            yield f"{name}:"
            for key, value in facts.items():
                yield from textwrap.wrap(f"{key}: {value}", WIDTH, initial_indent="  ", subsequent_indent="    ")
        yield f"{len(self.problems)} problems"
        for problem in self.problems:
            yield from textwrap.wrap(problem, WIDTH, initial_indent="  - ", subsequent_indent="    ")
        yield ""
        yield self.verdicts()

    def write(self, folder: Path) -> None:
        """card.json and card.md."""
        how = {
            "command": shlex.join(["re2tal", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "versions": {
                "re2tal": re2tal.__version__,
                "python": platform.python_version(),
                **{name: installed_version(name) for name in PACKAGES},
            },
        }
        document = {
            **how,
            "dataset": self.dataset,
            "tiny": self.tiny,
            "facts": self.facts,
            "problems": self.problems,
            "comparison": self.rows(),
            "training": dict(self.summary),
            "scores": None if self.scored is None else self.scored.to_json(),
        }
        write_json(folder / "card.json", document)
        title = f"# {self.dataset} reproduced{', in tiny' if self.tiny else ''}"
        text = [title, "", *(f"- {name}: {value}" for name, value in how.items()), "", "```", str(self), "```"]
        if self.summary:
            text += ["", "Training:", "", "```", *(f"{key}: {value}" for key, value in self.summary.items()), "```"]
        if self.scored is not None:
            text += ["", "Scores, protocol opentad:", "", "```", str(self.scored), "```"]
        write_atomically(folder / "card.md", "\n".join(text) + "\n")
