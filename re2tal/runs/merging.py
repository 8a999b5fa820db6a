"""`re2tal merge-results`: the detections of several runs as one results file, and names for class-agnostic ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from re2tal.data.building.labels import twin_problems
from re2tal.evaluation.coverage import cut_by_limit, name_some
from re2tal.evaluation.ground_truth import ANY_CLASS
from re2tal.evaluation.results import Results, read_results, write_results
from re2tal.evaluation.suppression import SuppressionConfig, suppress
from re2tal.evaluation.video_classes import Fusion, read_video_classes
from re2tal.files import output_file
from re2tal.inference import concatenate
from re2tal.options import COUNT, check_options
from re2tal.runs.epic_kitchens import write_submission
from re2tal.structures import Detections
from re2tal.video_ids import match_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """How results are merged."""

    weights: tuple[float, ...] = ()
    """What each file's scores are multiplied by, in the order of the files; by default all by 1."""
    suppression: SuppressionConfig = field(default_factory=SuppressionConfig)
    """Of repeated detections, among all files together. A single file is left as it is."""
    video_classes: Path | None = None
    """Scores of a classifier of whole videos that name class-agnostic detections, as for re2tal detect."""
    top_k: int = 2
    """With video_classes, each detection is written once for each of its video's so many best classes."""
    fusion: Fusion = "product"
    """With video_classes, a score is the detection's times its class's, or the square root of that."""
    verb_noun_tiou: float | None = None
    """Make a submission to EPIC-Kitchens-100 of two files, of verbs and of nouns: a verb and a noun that overlap by at
    least this tIoU are an action, whose score is the product of theirs. At most suppression.max_per_video a video."""


AS_USUAL = MergeOptions()


@dataclass(frozen=True, slots=True)
class Merged:
    """What was written."""

    path: Path
    num_videos: int
    num_detections: int
    notes: tuple[str, ...]
    """What did not meet, a sentence each."""


def merge_results(paths: Sequence[Path], out: Path, options: MergeOptions = AS_USUAL) -> Merged:
    """Write the detections of all files, per video suppressed together, to `out`.

    A video that only some of the files have is kept, and noted. Raises ValueError, before anything is written, for
    weights that do not fit, a file that is given twice, scores below 0, files without a video in common, and video
    classes for detections that have classes.
    """
    check_options(options, top_k=COUNT)
    out = output_file(out, option="--out")
    weights = options.weights or (1.0,) * len(paths)
    if not paths:
        raise ValueError("no results were given; name the results JSON of two runs or more")
    if len(weights) != len(paths):
        raise ValueError(f"{len(paths)} results and {len(weights)} weights were given; give a weight for each, or none")
    if not all(0 < weight < 1e6 for weight in weights):
        raise ValueError(f"weights are {weights}; give positive numbers")
    # Resolved, so that a link does not count as another file.
    if repeated := [path for path, times in Counter(path.resolve() for path in (*paths, out)).items() if times > 1]:
        raise ValueError(f"{repeated[0]} is given twice; give different files, and another one to write")
    files = [read_results(path) for path in paths]
    # For all files before anything is merged.
    best = [_best_score(results, path) for results, path in zip(files, paths, strict=True)]
    if options.verb_noun_tiou is not None:
        return _as_submission(files, paths, out, options)
    found, classes, notes = _together(files, paths, weights)
    # One file alone is suppressed already; soft-NMS a second time would lower its scores again.
    if len(files) > 1:
        notes += _unlike_scores([weight * score for weight, score in zip(weights, best, strict=True)], paths)
        found = {video_id: _suppressed(one, video_id, options.suppression) for video_id, one in found.items()}
        if cut := {video_id: one.num_cut for video_id, one in found.items() if one.num_cut}:
            notes.append(cut_by_limit(cut))
    if options.video_classes is not None:
        if len(classes) > 1:
            raise ValueError(
                f"video classes, {options.video_classes}, were given, but {paths[0]} has classes of its own, such as "
                f"{name_some(classes)}; leave the file out"
            )
        if classes not in ((), (ANY_CLASS,)):
            notes.append(f"all detections are called {classes[0]!r}, and get the classes of {options.video_classes}")
        namer = read_video_classes(options.video_classes, fusion=options.fusion)
        namer.check(found, top_k=options.top_k)
        found, classes = namer.name(found, top_k=options.top_k), namer.classes
    write_results(out, found, classes)
    return Merged(out, len(found), sum(map(len, found.values())), tuple(notes))


def _best_score(results: Results, path: Path) -> float:
    """ValueError for a score below 0: products and means of such scores have no meaning."""
    scores = torch.cat([one.scores for one in results.predictions.values()]) if results.predictions else torch.zeros(0)
    if len(scores) and (least := float(scores.min())) < 0:
        raise ValueError(f"{path} has scores down to {least:.4g}; give probabilities, not logits")
    return float(scores.max()) if len(scores) else 0.0


def _unlike_scores(best: Sequence[float], paths: Sequence[Path]) -> list[str]:
    """A note if some files have probabilities, and others more: percentages, say."""
    # All alike, whichever kind they are: nothing weighs more than it should.
    if max(best) <= 1 or min(best) > 1:
        return []
    highest = ", ".join(f"{path} {score:.4g}" for path, score in zip(paths, best, strict=True))
    return [f"the files' scores differ in kind, so that some count for little; give weights. Highest are: {highest}"]


def _as_submission(files: Sequence[Results], paths: Sequence[Path], out: Path, options: MergeOptions) -> Merged:
    tiou, limit = options.verb_noun_tiou, options.suppression.max_per_video
    others = MergeOptions(verb_noun_tiou=tiou, suppression=SuppressionConfig(max_per_video=limit))
    if len(files) != 2 or options != others or tiou is None or not 0 < tiou <= 1:
        raise ValueError(
            f"verb_noun_tiou is {tiou}, with {len(files)} files; give a number above 0, at most 1, two files, verbs "
            "first, and no other option but suppression.max_per_video"
        )
    verbs, nouns = files
    renamed = match_ids(nouns.predictions, verbs.predictions)
    nouns = replace(nouns, predictions={renamed.get(name, name): one for name, one in nouns.predictions.items()})
    videos = [set(results.predictions) for results in (verbs, nouns)]
    if not videos[0] & videos[1]:
        raise ValueError(f"{paths[0]} and {paths[1]} have no video in common; give results of the same videos")
    notes = [
        f"{path} lacks {len(missing)} videos of the other file, which are left out: {name_some(sorted(missing))}"
        for path, missing in zip(paths, (videos[1] - videos[0], videos[0] - videos[1]), strict=True)
        if missing
    ]
    kinds = [f"{len(one.classes)} {kind}" for kind, one in (("verbs", verbs), ("nouns", nouns))]
    # Labels are numbers of either, so that only the number of classes tells: there are 97 verbs and 300 nouns.
    swapped = ": more verbs than nouns, are they swapped?" if len(verbs.classes) > len(nouns.classes) else ""
    notes.append(f"{paths[0]} has {kinds[0]}, {paths[1]} {kinds[1]}{swapped}")
    number = write_submission(verbs, nouns, out, min_tiou=tiou, max_per_video=limit)
    return Merged(out, len(videos[0] & videos[1]), number, tuple(notes))


def _together(
    files: Sequence[Results], paths: Sequence[Path], weights: Sequence[float]
) -> tuple[dict[str, Detections], tuple[str, ...], list[str]]:
    """All detections by video, weighted and with common labels; the labels' names; notes."""
    index: dict[str, int] = {}
    parts: dict[str, list[Detections]] = {}
    seen: list[set[str]] = []
    for results, weight in zip(files, weights, strict=True):
        # Against all files before it, so that a video has the id of the first that names it.
        renamed = match_ids(results.predictions, parts) if parts else {}
        labels = torch.tensor([index.setdefault(name, len(index)) for name in results.classes], dtype=torch.int64)
        ours = {renamed.get(video_id, video_id): one for video_id, one in results.predictions.items()}
        for video_id, one in ours.items():
            parts.setdefault(video_id, []).append(replace(one, scores=one.scores * weight, labels=labels[one.labels]))
        seen.append(set(ours))
    if not set.intersection(*seen):
        raise ValueError(
            f"{', '.join(map(str, paths))} have no video in common: the first has {name_some(sorted(seen[0]))}; give "
            "results of the same videos"
        )
    notes = [
        f"{path} lacks {len(missing)} of the {len(parts)} videos, which have the others' detections alone: "
        f"{name_some(missing)}"
        for path, there in zip(paths, seen, strict=True)
        if (missing := [video_id for video_id in parts if video_id not in there])
    ]
    notes += [*_label_notes(files, paths, index), *twin_problems(list(index), or_fix="")]
    return {video_id: concatenate(some) for video_id, some in parts.items()}, tuple(index), notes


def _label_notes(files: Sequence[Results], paths: Sequence[Path], index: Mapping[str, int]) -> list[str]:
    return [
        f"{path} never predicts {len(missing)} of the {len(index)} classes: {name_some(missing)}"
        for path, results in zip(paths, files, strict=True)
        if (missing := [name for name in index if name not in results.classes])
    ]


def _suppressed(found: Detections, video_id: str, config: SuppressionConfig) -> Detections:
    try:
        return suppress(found, config)
    except ValueError as error:
        raise ValueError(f"video {video_id!r}: {error}") from error
