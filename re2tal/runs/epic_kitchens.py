"""Submissions to EPIC-Kitchens-100's detection challenge: made of verbs and nouns, and scored against its table."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from re2tal.data.building.annotation_formats.found import as_seconds, subset_in_name
from re2tal.data.building.annotations import read_video_ids
from re2tal.evaluation.epic_kitchens import EpicReport, pair_verbs_with_nouns, read_submission, score_submission
from re2tal.evaluation.protocols import TIOU_THRESHOLDS
from re2tal.evaluation.results import Results
from re2tal.runs.evaluation import ScoringOptions
from re2tal.strict_json import write_json
from re2tal.structures import Action, VideoRecord

# The challenge's own format and version.
SUBMISSION = {"version": "0.2", "challenge": "action_detection", "sls_pt": -1, "sls_tl": -1, "sls_td": -1}
"""Head of a file. The three levels of supervision are the submitter's to fill in."""
NUM_VERBS, NUM_NOUNS = 97, 300
COLUMNS = ("video_id", "start_timestamp", "stop_timestamp", "verb_class", "noun_class")


def write_submission(verbs: Results, nouns: Results, out: Path, *, min_tiou: float, max_per_video: int) -> int:
    """Writes a submission of the detections of two runs, in videos that both have; gives the number of actions.

    Raises ValueError for a label that is no number of a verb or noun, such as 3 or id_003.
    """
    both = (verbs, "verb", NUM_VERBS), (nouns, "noun", NUM_NOUNS)
    numbers = [[_number(label, kind, count) for label in results.classes] for results, kind, count in both]
    submitted = {}
    # A video of one file alone can have no pair.
    for video_id in verbs.predictions.keys() & nouns.predictions.keys():
        one, other = verbs.predictions[video_id], nouns.predictions[video_id]
        found = pair_verbs_with_nouns(one, other, min_tiou=min_tiou, most=max_per_video)
        segments, scores, verb, noun = (values.tolist() for values in found)
        labels = [
            (numbers[0][one.labels[which].item()], numbers[1][other.labels[whose].item()])  # type: ignore[index]
            for which, whose in zip(verb, noun, strict=True)
        ]
        submitted[video_id] = [
            {"verb": v, "noun": n, "action": f"{v},{n}", "segment": segment, "score": score}
            for (v, n), segment, score in zip(labels, segments, scores, strict=True)
        ]
    write_json(out, {**SUBMISSION, "results": dict(sorted(submitted.items()))})
    return sum(map(len, submitted.values()))


def _number(label: str, kind: str, count: int) -> int:
    if (found := re.fullmatch(r"(?:id_)?(\d+)", label)) is None or int(found[1]) >= count:
        raise ValueError(
            f"label {label!r} is no number of a {kind}; give results whose labels are id_000 to id_{count - 1:03d}, "
            "verbs before nouns"
        )
    return int(found[1])


def evaluate_submission(predictions: Path, table: Path, options: ScoringOptions) -> EpicReport:
    """The mAP of verbs, nouns and actions. Of `options`, thresholds and blocked videos count; others are refused."""
    kept = ScoringOptions(
        dataset=options.dataset, tiou_thresholds=options.tiou_thresholds, blocked_videos=options.blocked_videos
    )
    # thumos14 is what the option says by itself, and stands for nothing having been said.
    if options != kept or options.dataset not in ("thumos14", "epic-kitchens"):
        raise ValueError(
            f"{table} is scored by EPIC-Kitchens' own rules, with --tiou-thresholds and --blocked-videos at most; "
            "leave the other options out"
        )
    truths = read_table(table)
    report = score_submission(
        read_submission(predictions),
        truths,
        tiou_thresholds=options.tiou_thresholds or TIOU_THRESHOLDS["epic-kitchens"],
        blocked_videos=read_video_ids(options.blocked_videos) if options.blocked_videos else (),
    )
    try:
        # Videos are the same in all three tasks; verbs and actions come from one row, so that one of them tells enough.
        report.tasks["verb"].coverage.check()
    except ValueError as error:
        raise ValueError(f"{predictions} and {table} do not match: {error}") from None
    return report


def read_table(path: Path) -> list[VideoRecord]:
    """The videos of a table of narrated segments; actions are labelled "verb,noun". ValueError names line and value."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; check the path")
    by_video: dict[str, list[Action]] = {}
    # Spreadsheets put a byte order mark before the first column's name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
            raise ValueError(
                f"{path} has no column {missing[0]!r}; give EPIC_100_validation.csv, or annotations as JSON"
            )
        # The header is line 1.
        for number, row in enumerate(rows, start=2):
            start, end, verb, noun = _values(row, f"{path}, line {number}")
            by_video.setdefault(row["video_id"], []).append(Action(start, end, f"{verb},{noun}"))
    subset = subset_in_name(path) or path.stem
    return [
        # The table has no lengths; the last action's end stands in, as in read_ground_truth.
        VideoRecord(video_id, subset, max(one.end_seconds for one in actions), tuple(actions))
        for video_id, actions in by_video.items()
    ]


def _values(row: dict[str, str | None], where: str) -> Iterator[float | int]:
    for name in ("start_timestamp", "stop_timestamp"):
        if (seconds := as_seconds(row[name])) is None:
            raise ValueError(f"{where}: {name} is {row[name]!r}; give HH:MM:SS.ss")
        yield seconds
    for name in ("verb_class", "noun_class"):
        if not (row[name] or "").isdecimal():
            raise ValueError(f"{where}: {name} is {row[name]!r}; give the number of a class")
        yield int(row[name] or "")
