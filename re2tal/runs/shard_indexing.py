"""WebDataset tars of others in, shard folders out; what does not fit is left out, counted and named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from re2tal.data.building.annotations import Annotations, read_annotations, read_class_list
from re2tal.data.building.clips import ClipList
from re2tal.data.building.index_tars import Sample, index_tars, list_clips, read_samples
from re2tal.runs.shard_building import print_some, report_built, subsets_to_build


@dataclass(frozen=True, slots=True)
class Index:
    """Take the videos of plain WebDataset tars as they are, after checking that each can be read by frame number.

    The tars may come from ShardWriter, img2dataset or video2dataset: KEY.mp4 beside KEY.json, .txt or .cls. Other
    members are ignored. Exit status 3 if more than --max-rejected of the videos cannot be used, 2 for wrong input.
    """

    tars: tyro.conf.Positional[Path]
    """Folder with .tar files, however deep."""
    out: Path
    """Folder to write to; each subset gets a folder in it."""
    annotations: Path | None = None
    """JSON in the layout of ActivityNet. A video is found by its key, or by video_id, id or url of its .json. Without
    it, the tars hold trimmed clips whose .cls, .txt or .json says their class."""
    subset: str = "training"
    """Without annotations: what the tars hold."""
    classes: Path | None = None
    """Text file with one class per line; it fixes their order, and labels that are numbers count in it."""
    dataset: str = "own"
    """Its name in the manifest."""
    max_rejected: float = 0.05
    """Share of a subset's videos that may be unusable without the exit status saying so."""


def index(options: Index) -> int:
    """Write the shard folders; gives the exit status."""
    samples, broken = read_samples(options.tars)
    print_some([f"cannot be read to its end: {line}" for line in broken], more="tars")
    listed = _listed(options, samples)
    status = 0
    for subset in subsets_to_build(listed):
        built = index_tars(listed, samples, out=options.out, subset=subset, dataset=options.dataset)
        status = max(status, report_built(built, subset=subset, max_rejected=options.max_rejected))
    return status


def _listed(options: Index, samples: list[Sample]) -> Annotations | ClipList:
    classes = read_class_list(options.classes) if options.classes else None
    if options.annotations is None:
        clips, left_out = list_clips(samples, subset=options.subset, classes=classes)
        print_some([f"left out {line}" for line in left_out], more="samples")
        return clips
    annotations = read_annotations(options.annotations, classes=classes)
    known = {record.video_id for records in annotations.subsets.values() for record in records}
    unknown = [
        f"not in {options.annotations}: {s.tar.name} {s.key}" for s in samples if not known.intersection(s.names)
    ]
    print_some(unknown, more="samples")
    return annotations
