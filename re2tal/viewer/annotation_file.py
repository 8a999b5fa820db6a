"""The annotations that the page shows and saves: one file in ActivityNet's layout, and whoever else writes it.

A save names the revision that its edits began from. If the file has another one by now, somebody else has saved, and
`Conflict` says so; the same edits sent again with `merge` are put together with theirs, action by action:

    merged = base + what they added or removed + what I did, where what both did counts once

so what either side added stays, what either side removed goes, and nothing is lost without a word.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from re2tal.data.building.annotation_entries import SUBSET_NAME
from re2tal.data.building.labels import folded, is_label
from re2tal.files import sha256_of, write_atomically
from re2tal.strict_json import brief, finite_number, read_json
from re2tal.structures import Action, VideoRecord
from re2tal.video_ids import id_fault


class Conflict(ValueError):
    """Somebody else has saved since these edits began."""

    def __init__(self, message: str, *, revision: str, both: Sequence[str]) -> None:
        super().__init__(message)
        self.revision = revision
        self.both = both
        """Videos that both sides changed."""


@dataclass(frozen=True, slots=True)
class Edit:
    """The actions of one video, before and after."""

    key: str
    """Of the video's entry: its id, perhaps with the suffix of its file."""
    duration_seconds: float
    base: tuple[Action, ...]
    actions: tuple[Action, ...]


@dataclass(frozen=True, slots=True)
class State:
    """What the file holds at one moment."""

    revision: str
    document: dict[str, Any]

    @property
    def database(self) -> dict[str, Any]:
        """Key -> entry; some files have no outer object."""
        return self.document.get("database", self.document)

    def actions(self, key: str, where: Path | str = "annotations") -> tuple[Action, ...]:
        """The actions of one entry, "Ambiguous" ones too; none where there is no such entry.

        Raises ValueError naming file, key and value for an entry that is no ActivityNet layout.
        """
        entry = self.database.get(key, {})
        annotations = entry.get("annotations", []) if isinstance(entry, dict) else None
        if not isinstance(annotations, list):
            raise ValueError(f'{where}: database[{key!r}] is {brief(entry)}; it needs "annotations", a list')
        return tuple(_action(f"{where}: database[{key!r}].annotations[{n}]", a) for n, a in enumerate(annotations))

    def is_annotated(self, key: str) -> bool:
        """Whether somebody has said what happens in this video, be it nothing."""
        return isinstance(self.database.get(key), dict) and "annotations" in self.database[key]

    def subset(self, key: str) -> str | None:
        """What the entry says, in lower case."""
        entry = self.database.get(key)
        subset = entry.get("subset") if isinstance(entry, dict) else None
        return subset.lower() if isinstance(subset, str) else None

    def duration_seconds(self, key: str) -> float | None:
        """What the entry says, or its frames and their rate."""
        entry = self.database.get(key)
        if not isinstance(entry, dict):
            return None
        duration, frames, rate = (finite_number(entry.get(name)) for name in ("duration", "frame", "fps"))
        if duration and duration > 0:
            return duration
        return frames / rate if frames and rate and frames > 0 and rate > 0 else None


class AnnotationFile:
    """Reads and writes `save_to`; until it exists, `source` or `records` stand in for it."""

    def __init__(
        self, save_to: Path, *, source: Path | None = None, records: Sequence[VideoRecord] = (), subset: str
    ) -> None:
        """`subset` is that of videos that have no entry yet."""
        if not SUBSET_NAME.fullmatch(subset):
            raise ValueError(f'--subset is {subset!r}; give a name such as "training"')
        self.save_to, self.source, self.subset = save_to, source, subset
        self._records = records
        self._lock = threading.Lock()
        self._cached: tuple[object, State] | None = None

    @property
    def path(self) -> Path | None:
        """The file that counts now."""
        return self.save_to if self.save_to.exists() else self.source

    def state(self) -> State:
        """What is on the disk now; the file is read again only if it changed."""
        path = self.path
        mark = None if path is None else (path, *_mark(path))
        # Taken once: other threads may replace it between two looks. What they put there is as good.
        cached = self._cached
        if cached is None or cached[0] != mark:
            cached = mark, self._read(path)
            self._cached = cached
        return cached[1]

    def save(self, edits: Sequence[Edit], *, revision: str, merge: bool = False) -> State:
        """Put the edits into the file, atomically; gives the new state.

        Raises Conflict if the file is not at `revision`, or if both sides changed a video and `merge` is not set;
        ValueError for an action that no reader of annotations would take; OSError where nothing can be written.
        """
        # Threads of this program first, then other programs; between reading and writing nobody else saves.
        with self._lock, _locked(self.save_to.parent):
            state = self.state()
            edited = self.apply(state, edits, revision=revision, merge=merge)
            write_atomically(self.save_to, _text(edited))
            return self.state()

    def apply(self, state: State, edits: Sequence[Edit], *, revision: str, merge: bool = False) -> dict[str, Any]:
        """The document with the edits in it; nothing is written. The same errors as `save`."""
        theirs = {edit.key: state.actions(edit.key) for edit in edits}
        # As counts: an order of actions means nothing.
        both = [edit.key for edit in edits if Counter(theirs[edit.key]) != Counter(edit.base)]
        if state.revision != revision or (both and not merge):
            raise Conflict(
                f"{self.path} was saved by another program since these edits began", revision=state.revision, both=both
            )
        # All labels of the file, not only of the edited videos: classes are shared.
        spellings = {folded(label): label for label in _labels(state.database)}
        database = dict(state.database)
        for edit in edits:
            merged = merge_actions(edit.base, theirs[edit.key], edit.actions)
            # What was in the file already stays, even if it could not be added today.
            for action in (Counter(merged) - Counter(theirs[edit.key])).elements():
                _refuse_wrong_action(edit, action, spellings)
            database[edit.key] = self._entry(database.get(edit.key), edit, merged)
        # A copy: `state` may be cached.
        return {**state.document, "database": database} if "database" in state.document else database

    def _read(self, path: Path | None) -> State:
        if path is None:
            entries = {one.video_id: _as_entry(one) for one in self._records}
            return State("new", {"version": "re2tal", "database": entries})
        while True:
            # Another program may write meanwhile: digest and content must be of one state of the file.
            mark, revision, document = _mark(path), sha256_of(path)[:16], read_json(path)
            if mark == _mark(path):
                break
        database = document.get("database", document) if isinstance(document, dict) else None
        if not isinstance(database, dict) or not all(isinstance(entry, dict) for entry in database.values()):
            raise ValueError(f'{path} needs an object "database" that maps video ids to annotations, at the top')
        return State(revision, document)

    def _entry(self, entry: Any, edit: Edit, merged: Sequence[Action]) -> dict[str, Any]:
        """The entry with these actions; what else it says stays, also of each action that is still there."""
        if entry is None:
            if fault := id_fault(edit.key):
                raise ValueError(f"video {edit.key!r} cannot be annotated: {fault}")
            entry = {"subset": self.subset, "duration": edit.duration_seconds}
        kept: dict[Action, list[Any]] = {}
        for place, annotation in enumerate(entry.get("annotations", [])):
            kept.setdefault(_action(f"{edit.key}[{place}]", annotation), []).append(annotation)
        return {
            **entry,
            "annotations": [
                kept[action].pop(0)
                if kept.get(action)
                else {"segment": [action.start_seconds, action.end_seconds], "label": action.label}
                for action in merged
            ],
        }


def merge_actions(base: Sequence[Action], theirs: Sequence[Action], mine: Sequence[Action]) -> tuple[Action, ...]:
    """Both sides' changes of `base`, in the order of `mine`, then what only they have."""
    counts = [Counter(actions) for actions in (base, theirs, mine)]
    wanted: Counter[Action] = Counter()
    for action in set().union(*counts):
        before, there, here = (count[action] for count in counts)
        changes = (there - before, here - before)
        # Both added, or both removed: what both did counts once. Otherwise the changes stand against each other.
        alike = min(changes) >= 0 or max(changes) <= 0
        wanted[action] = before + (max(changes, key=abs) if alike else sum(changes))
    merged = []
    for action in (*mine, *theirs):
        if wanted[action] > 0:
            wanted[action] -= 1
            merged.append(action)
    return tuple(merged)


def _refuse_wrong_action(edit: Edit, action: Action, spellings: dict[str, str]) -> None:
    """ValueError for a new action that `re2tal.data.building.annotations` would refuse."""
    where = f"video {edit.key!r}: {action.label!r} from {action.start_seconds:g} to {action.end_seconds:g} s"
    if not is_label(action.label):
        raise ValueError(f"{where}: give a class name of 1 to 200 printable characters")
    # New labels are remembered, so that two edits of one request cannot bring two spellings.
    if (known := spellings.setdefault(folded(action.label), action.label)) != action.label:
        raise ValueError(f"{where}: the class is spelled {known!r} elsewhere; choose that, or another name")
    if not 0 <= action.start_seconds < action.end_seconds <= edit.duration_seconds:
        raise ValueError(f"{where}: an action starts before it ends, within the {edit.duration_seconds:g} s of video")


def _labels(database: Mapping[str, Any]) -> Iterator[str]:
    for entry in database.values():
        for annotation in entry.get("annotations") or []:
            if isinstance(annotation, dict) and isinstance(label := annotation.get("label"), str):
                yield label


def _action(where: str, annotation: Any) -> Action:
    segment = annotation.get("segment") if isinstance(annotation, dict) else None
    label = annotation.get("label") if isinstance(annotation, dict) else None
    times = [finite_number(value) for value in segment] if isinstance(segment, list) else []
    if len(times) != 2 or times[0] is None or times[1] is None or not isinstance(label, str):
        raise ValueError(
            f'{where} is {brief(annotation)}; it needs "segment", [start, end] in seconds, and "label", a name'
        )
    return Action(times[0], times[1], label)


def _as_entry(record: VideoRecord) -> dict[str, Any]:
    annotations = [{"segment": [one.start_seconds, one.end_seconds], "label": one.label} for one in record.actions]
    return {"subset": record.subset, "duration": record.duration_seconds, "annotations": annotations}


def _text(document: Mapping[str, Any]) -> str:
    """One line a video: a correction is one line in a diff."""
    outer = {key: value for key, value in document.items() if key != "database"} if "database" in document else None
    database = document["database"] if outer is not None else document
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(entry, allow_nan=False)}" for key, entry in database.items())
    if outer is None:
        return f"{{\n{lines}\n}}\n"
    others = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in outer.items())
    return f'{{{others}"database": {{\n{lines}\n}}}}\n'


def _mark(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Other viewers of this machine wait, where the system can lock a folder; no file is left behind."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    # The folder, not the file: a save replaces the file, and a lock on the old one would hold nobody.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network drives know no locks; revisions are compared all the same
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
