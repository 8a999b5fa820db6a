"""What videos and annotations are like, as far as a first configuration depends on it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from re2tal.data.building.annotation_entries import UNKNOWN_SECONDS
from re2tal.data.building.annotations import Annotations, read_annotations, read_keys
from re2tal.data.building.isolated import IsolatedPool
from re2tal.data.building.named_files import Chosen, NamedFiles, videos_in
from re2tal.data.building.pack_videos import SILENT_SECONDS, seconds_of
from re2tal.data.building.probe import VideoProbe, probe_video
from re2tal.data.building.shard_plan import NO_FILE
from re2tal.machine import num_cores
from re2tal.structures import VideoRecord

MOST_MEASURED = 200
"""Videos whose files are read; of more, so many, evenly spread."""
FEW_ACTIONS = 10
# Whole words: "upright" names no side.
SIDES = re.compile(r"(?i)(?<![a-z])(left|right|clockwise|anticlockwise|counterclockwise|lefthand|righthand)(?![a-z])")
# "TurnLeft" is two words.
CAPITALS = re.compile(r"(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What was found."""

    classes: Sequence[str]
    num_training: int
    """Videos of the training subset that have a file, or, where not all were looked for, are listed."""
    action_seconds: np.ndarray
    """(N,) lengths of training actions, sorted."""
    video_seconds: np.ndarray
    """(V,) lengths of annotated videos, sorted."""
    least_fps: float
    """Of the measured videos."""
    short_side: int
    """Median of the measured videos, pixels."""
    sided: Sequence[str]
    """Labels that name a side, or a direction of turning."""
    notes: Sequence[str]
    """What about the data may disappoint, a sentence each."""


def look_at(videos: Path, annotations: Path) -> DataFacts:
    """Reads the annotations, and the files of up to MOST_MEASURED of their videos.

    ValueError where there is no action, no file of an annotated video, or no subset to train on or to score.
    """
    keys = read_keys(annotations)
    chosen = NamedFiles(videos_in(videos)[0]).choose(list(keys), keys=keys)
    with _Files(chosen) as measure:
        read = read_annotations(annotations, duration_of=measure.seconds)
        training, validation = _subset(annotations, read, "training"), _subset(annotations, read, "validation")
        records = [*training, *validation]
        with_file = [one for one in records if one.video_id in chosen.found.keys() | chosen.faults.keys()]
        if not with_file:
            raise ValueError(
                f"{videos} has no file of the {len(records)} videos in {annotations}, such as "
                f"{records[0].video_id!r}; a file is called as the video's id"
            )
        probes, unusable = measure.many(one.video_id for one in _spread(with_file))
    lengths = [action.end_seconds - action.start_seconds for one in training for action in one.actions]
    if not lengths:
        raise ValueError(f"{annotations}: no video of its training subset has an action; there is nothing to learn")
    if not probes:
        raise ValueError(f"none of the videos can be used; the first: {unusable[0]}")
    measured = [one for one in with_file if one.duration_seconds != UNKNOWN_SECONDS]
    there = {one.video_id for one in measured}
    return DataFacts(
        classes=read.classes,
        num_training=sum(one.video_id in there for one in training),
        action_seconds=np.sort(lengths),
        video_seconds=np.sort([one.duration_seconds for one in measured]),
        # The slowest sets the rate for all: frames that a video has not cannot be shown.
        least_fps=min(one.num_frames / float(one.duration_seconds) for one in probes),
        short_side=int(np.median([min(one.width, one.height) for one in probes])),
        sided=[name for name in read.classes if SIDES.search(CAPITALS.sub(" ", name).replace("_", " "))],
        notes=_notes(read, training, validation, len(records) - len(with_file), unusable, len(probes)),
    )


def _subset(path: Path, read: Annotations, name: str) -> tuple[VideoRecord, ...]:
    try:
        return read.subset(name)
    except ValueError as error:
        raise ValueError(
            f"{path}: {error}; training needs both a training and a validation subset: re2tal annotations convert "
            f"{path} --validation 0.2 --out FILE puts a fifth of the videos without a subset into validation"
        ) from None


def _spread(records: Sequence[VideoRecord]) -> list[VideoRecord]:
    # Evenly over the list, as neighbours in it are often of one recording.
    chosen = np.linspace(0, len(records) - 1, min(len(records), MOST_MEASURED)).round().astype(int)
    return [records[index] for index in chosen]


class _Files:
    """Measures files, each in a process that can be stopped."""

    def __init__(self, chosen: Chosen[Path]) -> None:
        self._chosen = chosen
        self._num_workers = min(8, num_cores())
        self._isolated = IsolatedPool(self._num_workers)

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *error: object) -> None:
        self._isolated.__exit__(*error)

    def seconds(self, video_id: str) -> float:
        """How long a video lasts, as a build measures it."""
        return seconds_of(self._chosen.found.get(video_id), self._isolated)

    def many(self, video_ids: Iterable[str]) -> tuple[list[VideoProbe], list[str]]:
        """What each file holds, and why those that cannot be used cannot."""
        found: list[VideoProbe] = []
        unusable: list[str] = []

        def one(video_id: str) -> VideoProbe | str:
            if (path := self._chosen.found.get(video_id)) is None:
                return self._chosen.faults.get(video_id, NO_FILE)
            try:
                return self._isolated.call(SILENT_SECONDS, probe_video, path)
            except (ValueError, OSError) as error:  # one file never ends the look at the others
                return str(error)

        with ThreadPoolExecutor(self._num_workers) as pool:
            for result in pool.map(one, video_ids):
                (unusable if isinstance(result, str) else found).append(result)  # type: ignore[arg-type]
        return found, unusable


def _notes(
    read: Annotations,
    training: Sequence[VideoRecord],
    validation: Sequence[VideoRecord],
    num_missing: int,
    unusable: Sequence[str],
    num_measured: int,
) -> list[str]:
    notes = list(read.notes)
    if num_missing:
        notes.append(f"{num_missing} annotated videos have no file; they will be left out (re2tal doctor names them)")
    if unusable:
        notes.append(f"{len(unusable)} of {num_measured + len(unusable)} files cannot be used, such as: {unusable[0]}")
    seen, scored = (Counter(a.label for one in some for a in one.actions) for some in (training, validation))
    if unseen := sorted(set(scored) - set(seen)):
        notes.append(f"{_named(unseen)} in the validation subset only: nothing can learn what no training video shows")
    if unscored := sorted(set(seen) - set(scored)):
        notes.append(f"{_named(unscored)} in the training subset only: no figure will say how well they are found")
    if few := sorted(name for name, count in seen.items() if count < FEW_ACTIONS):
        notes.append(f"{_named(few)}: fewer than {FEW_ACTIONS} training actions each; expect little of them")
    return notes


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} ({shown}{', ...' if len(names) > 5 else ''})"
