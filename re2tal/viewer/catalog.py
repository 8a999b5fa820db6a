"""What the page shows: videos, their files, predictions and true actions, and the type of each prediction."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from re2tal.evaluation.ground_truth import ANY_CLASS
from re2tal.evaluation.results import Results
from re2tal.structures import AMBIGUOUS, Action
from re2tal.video_ids import composed, match_ids, plain_id
from re2tal.viewer.annotation_file import AnnotationFile, Edit, State
from re2tal.viewer.errors import MISSED, TYPES, Typed, type_predictions
from re2tal.viewer.media import Media

MAX_NAMED = 5
"""Ids in one note."""


@dataclass(frozen=True, slots=True)
class ViewedVideo:
    """One video of the list."""

    video_id: str
    key: str
    """Of its entry in the annotations, or of the one it would get."""
    media: Media | None
    """Its file, if there is one."""


@dataclass
class Catalog:
    """The videos of one page. Requests come from several threads; nothing here changes but caches."""

    title: str
    results: Results
    annotations: AnnotationFile
    videos: tuple[ViewedVideo, ...]
    tiou: float
    """From which temporal IoU on a prediction matches a true action."""
    notes: tuple[str, ...]
    measure: Callable[[Path], float]
    """Seconds of a video file; ValueError where it is none."""
    class_agnostic: bool = False
    """The predictions have no classes, so that any true action is of the right one."""
    _measured: dict[Path, float | None] = field(default_factory=dict)
    _types: dict[str, tuple[tuple[Action, ...], Typed]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def summary(self) -> dict[str, Any]:
        """The list of videos with counts, without any detection."""
        state = self.annotations.state()
        labels = {label: None for label in self.results.classes}
        videos = []
        for video in self.videos:
            actions = state.actions(video.key)
            labels.update(dict.fromkeys(action.label for action in actions))
            found = self.results.of(video.video_id)
            typed = self._typed(video, actions) if state.is_annotated(video.key) else None
            videos.append(
                {
                    "id": video.video_id,
                    "subset": state.subset(video.key),
                    "predictions": len(found),
                    "truths": len(actions),
                    "best": float(found.scores.max()) if len(found) else None,
                    "types": typed.counts() if typed else {},
                    "annotated": typed is not None,
                    "media": video.media is not None,
                }
            )
        return {
            "title": self.title,
            "notes": self.notes,
            "classes": list(labels),
            "types": [*TYPES, MISSED],
            "tiou": self.tiou,
            "saveTo": str(self.annotations.save_to),
            "revision": state.revision,
            "videos": videos,
        }

    def detail(self, index: int) -> dict[str, Any]:
        """Predictions and actions of one video."""
        video, state = self.videos[index], self.annotations.state()
        found, actions = self.results.of(video.video_id), state.actions(video.key)
        return {
            "duration": self.duration_seconds(video, state),
            "revision": state.revision,
            "predictions": [
                [*segment, score, self.results.classes[label]]
                for segment, score, label in zip(
                    found.segments.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
                )
            ],
            "actions": [[one.start_seconds, one.end_seconds, one.label] for one in actions],
            **self.typed(index, actions),
        }

    def typed(self, index: int, actions: tuple[Action, ...]) -> dict[str, Any]:
        """The types of a video's predictions against these actions, and which actions are missed.

        Without types while the video has no entry in the annotations: what nobody has looked at is not wrong.
        """
        video = self.videos[index]
        if not self.annotations.state().is_annotated(video.key):
            return {"types": None, "missed": []}
        typed = self._typed(video, actions)
        return {"types": typed.types, "missed": typed.missed}

    def duration_seconds(self, video: ViewedVideo, state: State) -> float | None:
        """As the annotations say, or else the file; None where neither does."""
        duration = state.duration_seconds(video.key)
        # A member of a tar is no file that could be measured.
        if duration is not None or video.media is None or video.media.pair_offset is not None:
            return duration
        path = video.media.path
        # Under the lock, so that several requests do not measure one file at once.
        with self._lock:
            if path not in self._measured:
                try:
                    self._measured[path] = self.measure(path)
                # A file that cannot be read is measured once; the page does without its length.
                except ValueError:
                    self._measured[path] = None
            return self._measured[path]

    def edit(self, index: int, base: tuple[Action, ...], actions: tuple[Action, ...]) -> Edit:
        """An edit as the annotations take it; ValueError for a video of unknown length."""
        video = self.videos[index]
        duration = self.duration_seconds(video, self.annotations.state())
        if duration is None:
            raise ValueError(
                f"video {video.video_id!r}: its length is not known, so actions cannot be checked; give the folder of "
                "its file (--videos)"
            )
        return Edit(video.key, duration, base, actions)

    def _typed(self, video: ViewedVideo, actions: tuple[Action, ...]) -> Typed:
        known = self._types.get(video.video_id)
        if known is None or known[0] != actions:
            found, classes = self.results.of(video.video_id), self.results.classes
            judged = _as_one_class(actions) if self.class_agnostic else actions
            known = actions, type_predictions(found, judged, classes=classes, tiou=self.tiou)
            self._types[video.video_id] = known
        return known[1]


def make_catalog(
    title: str,
    results: Results,
    annotations: AnnotationFile,
    *,
    files: Mapping[str, Media] | None,
    tiou: float,
    notes: Sequence[str],
    measure: Callable[[Path], float],
) -> Catalog:
    """Put predictions, annotations and files together by their ids.

    Listed are all predicted videos, annotated ones of the same subsets, and, if nothing is predicted, all videos that
    have annotations or a file. `files` maps ids to video files; None if no folder was given.
    """
    state = annotations.state()
    for key in state.database:
        state.actions(key, annotations.path or "annotations")  # a fault is told now, not when the video is opened
    keys = _keys(results.predictions, state)
    # Annotated videos without predictions belong to the page only where their subset was predicted.
    subsets = {state.subset(key) for key in keys.values()}
    ids = list(results.predictions)
    taken = set(keys.values())
    # "clip.mov" and "clip.mp4" are two entries, which keep their suffixes, as does one beside a predicted "clip".
    sharing = Counter(ids) + Counter(map(plain_id, state.database))
    for key in state.database:
        if key not in taken and (not ids or state.subset(key) in subsets):
            keys[plain_id(key) if sharing[plain_id(key)] == 1 else key] = key
    if not ids:
        keys |= {video_id: video_id for video_id in files or {} if video_id not in keys}
    ids += [one for one in keys if one not in results.predictions]
    media = _media(ids, files or {})
    videos = tuple(ViewedVideo(one, keys.get(one, one), media.get(one)) for one in ids)
    found = _notes(videos, results, has_truth=bool(state.database), keys=keys, files=files)
    labels = {one.label for key in state.database for one in state.actions(key)}
    # What class-agnostic detectors write; a label of the truth may be called so too.
    class_agnostic = results.classes == (ANY_CLASS,) and bool(labels - {ANY_CLASS})
    if class_agnostic:
        found.append(f"The predictions have no classes (all are {ANY_CLASS!r}), so a true action of any is right.")
    catalog = Catalog(title, results, annotations, videos, tiou, (*notes, *found), measure, class_agnostic)
    catalog.summary()  # types all predictions once, so that the page need not wait for it
    return catalog


def _as_one_class(actions: Sequence[Action]) -> tuple[Action, ...]:
    return tuple(one if one.label == AMBIGUOUS else replace(one, label=ANY_CLASS) for one in actions)


def _keys(predicted: Mapping[str, Any], state: State) -> dict[str, str]:
    """Predicted id -> key of its entry, for those that have one."""
    renamed = match_ids(predicted, state.database)
    return {one: renamed.get(one, one) for one in predicted if renamed.get(one, one) in state.database}


def _media(ids: Sequence[str], files: Mapping[str, Media]) -> dict[str, Media]:
    """Id -> file, also where the two differ by suffix, prefix or Unicode form."""
    renamed = match_ids([composed(one) for one in ids], files)
    found = {one: files.get(renamed.get(composed(one), composed(one))) for one in ids}
    return {one: media for one, media in found.items() if media is not None}


def _notes(
    videos: Sequence[ViewedVideo],
    results: Results,
    *,
    has_truth: bool,
    keys: Mapping[str, str],
    files: Mapping[str, Media] | None,
) -> list[str]:
    """What is missing, a sentence each."""
    notes = []
    if not has_truth:
        notes.append("No annotations were given, so nothing is called right or wrong; --annotations FILE adds them.")
    elif strangers := [one for one in results.predictions if one not in keys]:
        which = (
            "None of the predicted videos is" if len(strangers) == len(results.predictions) else "Predicted, but not"
        )
        notes.append(f"{which} in the annotations: {_some(strangers)}.")
    if files is None:
        notes.append("No videos were given, so only the time axis is shown; --videos FOLDER adds them.")
    elif absent := [video.video_id for video in videos if video.media is None]:
        notes.append(f"Without a video file: {_some(absent)}.")
    if not results.predictions:
        notes.append("The results name no video.")
    return notes


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_NAMED])
    return f"{len(names)} video{'s' * (len(names) > 1)} ({shown}{', ...' if len(names) > MAX_NAMED else ''})"
