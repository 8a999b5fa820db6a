"""WebDataset tars of others in, shard folders out; what does not fit is left out, counted and named."""

from __future__ import annotations

from pathlib import Path

from re2tal.data.building.annotations import Annotations, read_annotations
from re2tal.data.building.clips import ClipList
from re2tal.data.building.index_tars import index_tars, measured_in
from re2tal.data.building.labels import read_class_list
from re2tal.data.building.match_samples import match_samples
from re2tal.data.building.tar_samples import list_clips, read_samples
from re2tal.runs.shard_building import for_each, parse_size, subsets_to_build
from re2tal.runs.shard_listing import print_some, report_built


def index(
    tars: Path,
    *,
    out: Path,
    annotations: Path | None,
    subset: str,
    classes: Path | None,
    dataset: str,
    max_rejected: float,
    fix_labels: bool,
    shard_size: str,
) -> int:
    """Write the shard folders; gives the exit status."""
    shard_bytes = parse_size(shard_size)
    samples, unread = read_samples(tars)
    print_some(unread, more="tars or folders")
    names = read_class_list(classes) if classes else None
    if annotations:
        listed: Annotations | ClipList = read_annotations(
            annotations, classes=names, duration_of=measured_in(samples), fix_labels=fix_labels
        )
    else:
        listed, left_out = list_clips(samples, subset=subset, classes=names, fix_labels=fix_labels)
        print_some([f"left out {line}" for line in left_out], more="samples")
    for note in listed.notes:
        print(f"{annotations or tars}: {note}")
    matches = match_samples(listed, samples)
    if annotations:
        # By identity: two tars may hold equal samples.
        taken = {id(sample) for sample in matches.found.values()}
        others = [f"no video of {annotations}: {one.tar.name} {one.key}" for one in samples if id(one) not in taken]
        print_some(others, more="samples")

    def one(name: str) -> int:
        built = index_tars(listed, matches, out=out, subset=name, dataset=dataset, shard_bytes=shard_bytes)
        return report_built(built, subset=name, max_rejected=max_rejected)

    return for_each(subsets_to_build(listed), one)
