"""Published data sets listed, described, and compared with an annotation file."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from re2tal.data.building.annotations import read_database
from re2tal.data.building.catalog import DATASETS, DatasetSpec, find_dataset
from re2tal.data.building.dataset_facts import DatasetFacts
from re2tal.data.building.subset_names import recipe_names
from re2tal.evaluation.protocols import TIOU_THRESHOLDS
from re2tal.runs.exit_status import SOME_LEFT_OUT
from re2tal.structures import AMBIGUOUS, find_subset
from re2tal.tables import text_table

MAX_NAMED = 10


@dataclass(slots=True)
class _Counted:
    """What a subset of a file holds."""

    videos: int = 0
    actions: int = 0
    labels: Counter[str] = field(default_factory=Counter)


def list_datasets() -> int:
    """Print a line per data set; gives the exit status."""
    header = ("name", "data set", "classes", "training", "validation", "test", "tIoU")
    rows = [
        (
            *(name, facts.title, str(facts.num_classes)),
            *(str(facts.subsets[one].videos[0]) if one in facts.subsets else "" for one in header[3:6]),
            _thresholds(facts),
        )
        for name, facts in _facts().items()
    ]
    print(text_table([header, *rows], align="<<>>>><", rules=(1,)))
    print("numbers of videos; `re2tal datasets NAME` tells all of one, with --check FILE compares an annotation file")
    return 0


def show_dataset(name: str) -> int:
    """Print what is known of a data set; gives the exit status."""
    facts = _find(name)
    spec = find_dataset(name)
    wrapped = ((name, textwrap.wrap(text, 96)) for name, text in _lines(facts, spec))
    rows = [("" if number else name, line) for name, lines in wrapped for number, line in enumerate(lines)]
    print(text_table(rows, align="<"))
    return 0


@dataclass(frozen=True, slots=True)
class ComparedFile:
    """An annotation file beside what is known of its data set."""

    videos: int
    actions: int
    renamed: Mapping[str, str]
    """Subset in the file -> what recipes call it, where the two differ."""
    differences: tuple[str, ...]
    """From the data set, a sentence each."""


def compare_with_facts(name: str, path: Path) -> ComparedFile:
    """Count what an annotation file holds, and what is different from the data set's known numbers."""
    facts, spec = _find(name), find_dataset(name)
    counted, renamed = _count(path, spec)
    videos, actions = (sum(getattr(one, what) for one in counted.values()) for what in ("videos", "actions"))
    differences = (*_differences(facts, counted), *_label_differences(facts, spec, counted))
    return ComparedFile(videos, actions, {old: new for old, new in renamed.items() if old != new}, differences)


def check_dataset(name: str, path: Path) -> int:
    """Compare an annotation file with what is known of a data set; gives the exit status."""
    compared = compare_with_facts(name, path)
    for old, new in compared.renamed.items():
        print(f"{path}: subset {old!r} is what recipes call {new!r}")
    for line in compared.differences:
        print(f"{path}: {line}")
    number = len(compared.differences)
    said = f"{number} differences from" if number else "as it should be for"
    print(f"{path}: {compared.videos} videos, {compared.actions} actions; {said} {_find(name).title}")
    return SOME_LEFT_OUT if number else 0


def _facts() -> dict[str, DatasetFacts]:
    return {name: spec.facts for name, spec in DATASETS.items() if spec.facts is not None}


def _find(name: str) -> DatasetFacts:
    known = _facts()
    try:
        return known[name]
    except KeyError:
        raise ValueError(f"nothing is known of a data set {name!r}; known: {', '.join(known)}") from None


def _thresholds(facts: DatasetFacts) -> str:
    found = next((values for name, values in TIOU_THRESHOLDS.items() if name == facts.thresholds), ())
    if not found:
        return "none agreed on"
    return f"{found[0]:.2g} to {found[-1]:.2g} by {(found[-1] - found[0]) / (len(found) - 1):.2g}"


def _lines(facts: DatasetFacts, spec: DatasetSpec) -> Iterator[tuple[str, str]]:
    yield "data set", facts.title
    few = f", of which {facts.num_annotated_classes} are annotated" if facts.num_annotated_classes else ""
    yield "classes", f"{facts.num_classes}{few}" + (f": {', '.join(spec.classes)}" if spec.classes else "")
    for name, subset in facts.subsets.items():
        parts = [f"{_either(subset.videos)} videos"]
        parts += [f"{_either(subset.actions)} actions"] if subset.actions else []
        yield name, ", ".join([*parts, *([subset.remark] if subset.remark else [])])
    if facts.total_actions is not None:
        yield "all", f"{facts.total_actions} actions"
    yield "numbers", "published" if facts.published else "counted in the files"
    yield "tIoU", _thresholds(facts)
    yield "files", " or ".join(one.format(id="ID") for one in spec.file_names)
    yield "left out", facts.blocked or "no list is in use"
    for trap in facts.traps:
        yield "note", trap
    yield "where", facts.source


def _count(path: Path, spec: DatasetSpec) -> tuple[dict[str, _Counted], Mapping[str, str]]:
    """(what is in each subset, by the names that recipes use; how they are called in the file -> there)."""
    entries: dict[str, list[dict[str, Any]]] = {}
    for key, entry in read_database(path).items():
        subset = entry.get("subset") if isinstance(entry, dict) else None
        if not isinstance(subset, str):
            raise ValueError(f"{path}: database.{key[:100]!r} has no subset; `re2tal annotations convert` adds it")
        # Some files write "Validation" in one place and "validation" in another.
        entries.setdefault(subset.lower(), []).append(entry)
    renamed = recipe_names(entries, spec.subset_pairs)
    counted: dict[str, _Counted] = {}
    for subset, videos in entries.items():
        one = counted.setdefault(renamed.get(subset, subset), _Counted())
        for video in videos:
            annotations = video.get("annotations")
            listed = annotations if isinstance(annotations, list) else []
            found = [item.get("label") for item in listed if isinstance(item, dict)]
            # Published counts leave "Ambiguous" out, which is no class.
            labels = [label for label in found if label != AMBIGUOUS]
            one.videos += 1
            one.actions += len(labels)
            one.labels.update(str(label) for label in labels)
    return counted, renamed


def _differences(facts: DatasetFacts, counted: Mapping[str, _Counted]) -> Iterator[str]:
    matched = {name: find_subset(name, counted) for name in facts.subsets}
    for name, wanted in facts.subsets.items():
        subset = matched[name]
        if subset is None:
            yield f"there is no {name}; wanted {_either(wanted.videos)} videos; there are {sorted(counted)}"
            continue
        remark = f" ({wanted.remark})" if wanted.remark else ""
        numbers = (
            ("videos", counted[subset].videos, wanted.videos),
            ("actions", counted[subset].actions, wanted.actions),
        )
        for what, number, right in numbers:
            # Several numbers may be right: lists of blocked videos differ.
            if right and number not in right:
                yield (
                    f"{name}: {number} {what}, {abs(number - right[0])} {_more(number, right[0])} than {right[0]}"
                    + (f" (or {_either(right[1:])})" if len(right) > 1 else "")
                    + remark
                )
    if others := sorted(set(counted) - set(matched.values())):
        yield f"it has other subsets: {', '.join(others)}"
    total = sum(one.actions for one in counted.values())
    if facts.total_actions is not None and total != facts.total_actions:
        away = abs(total - facts.total_actions)
        yield f"{total} actions in all, {away} {_more(total, facts.total_actions)} than {facts.total_actions}"


def _label_differences(facts: DatasetFacts, spec: DatasetSpec, counted: Mapping[str, _Counted]) -> Iterator[str]:
    labels = {label for one in counted.values() for label in one.labels}
    if spec.classes is not None:
        if missing := sorted(set(spec.classes) - labels):
            yield f"{len(missing)} classes have no action: {_some(missing)}"
        if unknown := sorted(labels - set(spec.classes)):
            yield f"{len(unknown)} labels are no classes of it: {_some(unknown)}"
        return
    right = facts.num_annotated_classes or facts.num_classes
    if len(labels) != right:
        yield f"{len(labels)} classes, {abs(len(labels) - right)} {_more(len(labels), right)} than {right}"


def _more(number: int, right: int) -> str:
    return "more" if number > right else "fewer"


def _either(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(map(repr, names[:MAX_NAMED])) + more
