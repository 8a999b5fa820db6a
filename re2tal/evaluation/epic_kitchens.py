"""EPIC-Kitchens-100's detection score: mAP of verbs, of nouns and of actions, from one submission.

    {"version": "0.2", "challenge": "action_detection", "sls_pt": 2, "sls_tl": 3, "sls_td": 3,
     "results": {video: [{"verb": 3, "noun": 14, "action": "3,14", "segment": [start, end], "score": 0.5}, ...]}}

A prediction takes part in all three tasks with its one score. Its action comes from "action", and need not repeat its
verb and noun. Only classes with a true action count. Source: github.com/epic-kitchens/C2-Action-Detection.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from re2tal.evaluation.average_precision import MapReport, mean_average_precision
from re2tal.evaluation.matching import match_predictions
from re2tal.evaluation.protocols import EPIC_KITCHENS
from re2tal.evaluation.results import read_detections
from re2tal.strict_json import brief, read_json
from re2tal.structures import Action, Detections, VideoRecord
from re2tal.tables import text_table

TASKS = ("verb", "noun", "action")


@dataclass(frozen=True, slots=True)
class EpicReport:
    """The mAP of each task; `str()` is a table in percent."""

    tasks: Mapping[str, MapReport]

    @property
    def average_map(self) -> float:
        """Of actions, by which the challenge ranks."""
        return self.tasks["action"].average_map

    def to_json(self) -> dict[str, Any]:
        """The figures by task, in types that `json` writes."""
        return {task: one.to_json() for task, one in self.tasks.items()}

    def __str__(self) -> str:
        first = self.tasks["action"]
        lines = [f"mAP in %, by tIoU; protocol {first.protocol}", first.coverage.facts()]
        for task, one in self.tasks.items():
            lines += [f"note: {task}: {note}" for note in one.coverage.notes()]
        rows = [("task", "classes", "truths", "predictions", *first.map_by_tiou, "average")]
        for task, one in self.tasks.items():
            counts = (len(one.classes), sum(one.num_truths), sum(one.num_predictions))
            values = [*one.map.tolist(), one.average_map]
            rows.append((task, *map(str, counts), *(f"{100 * value:.2f}" for value in values)))
        return "\n".join([*lines, text_table(rows, align="<>", rules=(1,))])


@dataclass(frozen=True, slots=True)
class Submission:
    """Predictions by video; `classes[task][number]` is the name that the task's labels index."""

    segments: Mapping[str, Detections]
    """Their labels are 0"""
    labels: Mapping[str, Mapping[str, torch.Tensor]]
    """Task -> video -> (N,) index into `classes`"""
    classes: Mapping[str, tuple[str, ...]]

    def of(self, task: str) -> dict[str, Detections]:
        """The predictions of one task."""
        return {video: replace(one, labels=self.labels[task][video]) for video, one in self.segments.items()}


def read_submission(path: Path | str) -> Submission:
    """Read a submission, strictly. Raises ValueError naming file, key and value for anything else."""
    document = read_json(path)
    results = document.get("results") if isinstance(document, dict) else None
    if not isinstance(results, dict):
        raise ValueError(f'{path} needs an object "results" that maps video ids to lists of predictions, at the top')
    numbers: dict[str, dict[str, int]] = {task: {} for task in TASKS}
    segments, labels = {}, {task: {} for task in TASKS}  # type: ignore[var-annotated]
    for video_id, rows in results.items():
        where = f"{path}: results[{video_id!r}]"
        if not isinstance(rows, list):
            raise ValueError(f"{where} is {brief(rows)}; it must be a list of predictions")
        named = [_names(row, f"{where}[{number}]") for number, row in enumerate(rows)]
        # The reader of results files checks segments and scores; it wants a label, which the tasks give later.
        segments[video_id] = read_detections(where, [row | {"label": ""} for row in rows], {})
        # Numbered in order of first appearance, each task by itself: only the names matter to the score.
        for place, task in enumerate(TASKS):
            index = numbers[task]
            found = [index.setdefault(names[place], len(index)) for names in named]
            labels[task][video_id] = torch.tensor(found, dtype=torch.int64)
    return Submission(segments, labels, {task: tuple(index) for task, index in numbers.items()})


def pair_verbs_with_nouns(
    verbs: Detections, nouns: Detections, *, min_tiou: float, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Actions of one video: segments (N, 2), scores (N,), and of which verb and which noun each is, best first.

    Each verb and each noun that overlap by at least `min_tiou` are one action: its score is the product of theirs, its
    segment their mean weighted by score. At most `most`.
    """
    # In float64, as the products decide an order, and equal ones are to stay equal.
    start, end = nouns.segments.double().T
    first, last = (x[:, None] for x in verbs.segments.double().T)
    overlap = (torch.minimum(last, end) - torch.maximum(first, start)).clamp_min(0)
    union = (last - first) + (end - start) - overlap
    # Without a division, which two empty segments would make 0 / 0. An overlap of 0 is none, even where min_tiou is 0.
    verb, noun = ((overlap >= min_tiou * union) & (overlap > 0)).nonzero(as_tuple=True)
    of_verb, of_noun = verbs.scores.double()[verb], nouns.scores.double()[noun]
    best = (of_verb * of_noun).argsort(descending=True, stable=True)[:most]
    verb, noun, of_verb, of_noun = (x[best] for x in (verb, noun, of_verb, of_noun))
    # Two scores of 0 have no share; they weigh the same.
    share = torch.nan_to_num(of_verb / (of_verb + of_noun), nan=0.5)[:, None]
    segments = share * verbs.segments.double()[verb] + (1 - share) * nouns.segments.double()[noun]
    return segments, of_verb * of_noun, verb, noun


def score_submission(
    submission: Submission,
    truths: Sequence[VideoRecord],
    *,
    tiou_thresholds: Sequence[float],
    blocked_videos: Collection[str] = (),
) -> EpicReport:
    """The three tasks; an action of `truths` is labelled "verb,noun". Errors as `match_predictions`."""
    return EpicReport(
        {
            task: mean_average_precision(
                match_predictions(
                    submission.of(task),
                    [replace(one, actions=tuple(_labelled(action, task) for action in one.actions)) for one in truths],
                    classes=submission.classes[task],
                    protocol=EPIC_KITCHENS,
                    tiou_thresholds=tiou_thresholds,
                    blocked_videos=blocked_videos,
                )
            )
            for task in TASKS
        }
    )


def _labelled(action: Action, task: str) -> Action:
    verb, _, noun = action.label.partition(",")
    return replace(action, label={"verb": verb, "noun": noun, "action": action.label}[task])


def _names(row: Any, where: str) -> tuple[str, str, str]:
    """Of verb, noun and action."""
    if not isinstance(row, dict) or not {"verb", "noun", "action", "segment", "score"} <= row.keys():
        raise ValueError(f'{where} is {brief(row)}; it needs "verb", "noun", "action", "segment" and "score"')
    for key in ("verb", "noun"):
        if type(row[key]) is not int or row[key] < 0:
            raise ValueError(f"{where}.{key} is {brief(row[key])}; give the number of a {key}, 0 or more")
    # Written "3,14", but also "3, 14" or "03,14"; all name the same action.
    pair = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", row["action"]) if isinstance(row["action"], str) else None
    if pair is None:
        raise ValueError(f'{where}.action is {brief(row["action"])}; give "VERB,NOUN", two numbers in one text')
    return str(row["verb"]), str(row["noun"]), f"{int(pair[1])},{int(pair[2])}"
