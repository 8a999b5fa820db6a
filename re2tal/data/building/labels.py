"""Names of classes: which are usable, and which are one name in two spellings.

`Diving`, `Diving ` and `diving` look alike to people and would silently be three classes; so would a letter with an
accent written as one character (NFC) or as two (NFD).
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeGuard


def read_class_list(path: Path) -> tuple[str, ...]:
    """Class names from a text file, one per line in their order, blank lines left out.

    Raises FileNotFoundError, and ValueError naming the file for one that names no class, or one of them twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--classes {path} is not a file")
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"--classes {path} is not a text file in UTF-8: {error}") from None
    if not names:
        raise ValueError(f"--classes {path} names no class; write one per line")
    if odd := [name for name in names if not is_label(name)]:
        raise ValueError(f"--classes {path} names {odd[0][:100]!r}; a name has 1 to 200 printable characters")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--classes {path} names {', '.join(repeated)} more than once; keep one line for each class")
    return names


def check_class_list(classes: Sequence[str] | None) -> frozenset[str] | None:
    """The class names as a set; ValueError for none, or for one that is there twice."""
    if classes is None:
        return None
    if len(set(classes)) < len(classes) or not classes:
        raise ValueError(f"the class list names {len(classes)} classes, {len(set(classes))} different; list each once")
    return frozenset(classes)


def is_label(label: object) -> TypeGuard[str]:
    """Whether this can be the name of a class: 1 to 200 printable characters."""
    return isinstance(label, str) and bool(label.strip()) and label.isprintable() and len(label) <= 200


def spellings(labels: Iterable[str]) -> list[Counter[str]]:
    """Groups of labels that differ by case, space or Unicode form only, with how often each spelling occurs."""
    groups: dict[str, Counter[str]] = {}
    for label, count in Counter(labels).items():
        groups.setdefault(folded(label), Counter())[label] += count
    return [group for group in groups.values() if len(group) > 1]


def folded(label: str) -> str:
    """What all spellings of one name share."""
    # NFKC also joins wide and narrow letters, and ligatures, which look alike.
    return "".join(unicodedata.normalize("NFKC", label).casefold().split())


def one_spelling(labels: Iterable[str], *, classes: Iterable[str] = ()) -> dict[str, str]:
    """Label -> what to write instead, for all that should change.

    A group takes the name in `classes`, else its most frequent spelling, in NFC and with single spaces.
    """
    named = {folded(name): name for name in classes}
    counts = Counter(labels)
    chosen: dict[str, str] = {}
    for label, _ in counts.most_common():
        # The most frequent comes first, and stays.
        chosen.setdefault(folded(label), " ".join(unicodedata.normalize("NFC", label).split()))
    return {label: new for label in counts if (new := (chosen | named)[folded(label)]) != label}


OR_FIX = ", or use --fix-labels"
"""The remedy beside correcting them, of commands that have it."""


def twin_problems(labels: Iterable[str], or_fix: str = OR_FIX) -> list[str]:
    """A sentence for each group of spellings, with the remedy."""
    return [
        f"labels {_listed(group)} differ only by case, space or Unicode form: correct them{or_fix}"
        for group in spellings(labels)
    ]


def fold_notes(replaced: Mapping[str, str]) -> list[str]:
    """A sentence for each label that was replaced."""
    return [f"label {_shown(old, [old, new])} read as {new!r}" for old, new in replaced.items()]


def _listed(group: Counter[str]) -> str:
    shown = [f"{_shown(label, group)} ({count} times)" for label, count in group.most_common()]
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def _shown(label: str, group: Iterable[str]) -> str:
    """Quoted; with escapes where another spelling would look the same."""
    alike = [one for one in group if unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", label)]
    return ascii(label) if len(set(alike)) > 1 else repr(label)


class Classes:
    """From labels as they are written to class names."""

    def __init__(self, written: Iterable[str], classes: Sequence[str] | None, *, or_fix: str = OR_FIX) -> None:
        """ValueError where all labels are numbers, and no class list says what they stand for."""
        self.known = check_class_list(classes)
        self.order = tuple(classes or ())
        self.hint = ""
        self._or_fix = or_fix
        labels = set(written)
        if classes is None and labels and all(label.isdecimal() for label in labels):
            raise ValueError(
                f"the labels are numbers ({', '.join(sorted(labels)[:3])}, ...), which name no class; give --classes "
                "FILE, with the name of class 0 in its first line, that of class 1 in the next, ..."
            )

    def name(self, label: str) -> str:
        """The class that `label` stands for; ValueError for one that is not among those given."""
        if not is_label(label):
            raise ValueError(f"the class is {label[:100]!r}: give a name of 1 to 200 printable characters")
        if self.known is None or label in self.known:
            return label
        if label.isdecimal():
            if int(label) < len(self.order):
                return self.order[int(label)]
            raise ValueError(f"the class is number {label[:20]}, and {len(self.order)} were given, counted from 0")
        if twin := {folded(name): name for name in self.order}.get(folded(label)):
            raise ValueError(f"class {label!r} is spelled {twin!r} in the list; correct it{self._or_fix}")
        self.hint = f"the {len(self.order)} classes are {', '.join(self.order[:30])}"
        raise ValueError(f"class {label!r} is not among those given: correct it, or add it")
