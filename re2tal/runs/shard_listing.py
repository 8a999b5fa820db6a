"""What shard folders hold, in a line, what a build left out, and whether every byte is as it was built."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from re2tal.data.building.shard_folder import BuiltSubset
from re2tal.data.contract.feature_manifest import (
    Extracted,
    FeatureManifest,
    FramesPerStep,
    Packed,
    SecondsPerStep,
    StepsPerVideo,
)
from re2tal.data.contract.manifest import FramesPerSecond, FramesPerVideo, Manifest
from re2tal.data.contract.shards import open_any
from re2tal.data.contract.verify import damage
from re2tal.runs.exit_status import DAMAGED, TOO_MANY_REJECTED

MAX_SHOWN = 20


def verify(folders: Sequence[Path]) -> int:
    """Print what is damaged; gives the exit status."""
    _refuse_none(folders)
    status = 0
    for folder in folders:
        opened = open_any(folder)
        problems = list(damage(opened))
        for problem in problems:
            print(problem, file=sys.stderr)
        state = f"{len(problems)} problems" if problems else "every byte as it was built"
        print(f"{folder}: {len(opened.videos)} videos in {len(opened.manifest.shards)} shards, {state}")
        status = DAMAGED if problems else status
    return status


def describe(folders: Sequence[Path]) -> int:
    """Print a line or two per folder; gives the exit status."""
    _refuse_none(folders)
    for folder in folders:
        manifest = open_any(folder).manifest
        totals = manifest.totals
        match manifest:
            case Manifest():
                seconds = manifest.totals.seconds
                what = f"{seconds / 3600:.2f} h, {_sampling(manifest)}, short side {manifest.encoding.short_side}"
            case FeatureManifest():
                what = f"{manifest.totals.steps} steps, {_features(manifest)}"
        print(
            f"{folder}: {manifest.dataset} {manifest.subset}, {totals.videos} videos, {what}, "
            f"{len(manifest.classes)} classes, {len(manifest.shards)} shards, {totals.num_bytes / 1e6:.1f} MB, "
            f"{len(manifest.rejected)} rejected"
        )
    return 0


def _refuse_none(folders: Sequence[Path]) -> None:
    # "All is sound" would be said of none.
    if not folders:
        raise ValueError("no folder was given; name folders of one subset each, such as SHARDS/training")


def _sampling(manifest: Manifest) -> str:
    match manifest.encoding.sampling:
        case FramesPerSecond(fps):
            return f"{fps:g} frames per second"
        case FramesPerVideo(num_frames):
            return f"{num_frames} frames per video"


def _features(manifest: FeatureManifest) -> str:
    spec = manifest.features
    match spec.grid:
        case SecondsPerStep(seconds):
            grid = f"a step per {seconds:g} s"
        case StepsPerVideo(num_steps):
            grid = f"{num_steps} steps per video"
        case FramesPerStep(stride):
            grid = f"a step per {stride} frames"
    match spec.origin:
        case Extracted(backbone=name, weights=weights):
            origin = f"{name} ({weights})"
        case Packed():
            origin = "another program"
    return f"{grid}, {spec.channels} channels in {spec.dtype} from {origin}"


def print_some(lines: Sequence[str], *, more: str) -> None:
    """Print the first lines to stderr, and how many there are besides."""
    for line in lines[:MAX_SHOWN]:
        print(line, file=sys.stderr)
    if len(lines) > MAX_SHOWN:
        print(f"and {len(lines) - MAX_SHOWN} more {more}", file=sys.stderr)


def report_built(built: BuiltSubset, *, subset: str, max_rejected: float) -> int:
    """Print what became of a subset, of videos or of features; gives the exit status."""
    print_some(built.notes, more="notes")
    rejected = [f"rejected {one.video_id}: {one.reason}" for one in built.rejected]
    damaged = [f"damaged {one.video_id}: {one.damage}" for one in built.damaged]
    for lines in (rejected, damaged):
        print_some(lines, more=f"in {built.folder}/manifest.json")
    if not built.is_complete:
        print(
            f"{subset}: {built.num_missing_shards} of {built.num_shards} shards are still to be built; run the other "
            "parts, or this command without --part"
        )
        return 0
    describe([built.folder])
    if built.rejected_share > max_rejected:
        print(
            f"{subset}: {len(built.rejected)} of {built.num_videos} videos cannot be used, more than the share of "
            f"{max_rejected:g} that --max-rejected allows",
            file=sys.stderr,
        )
        return TOO_MANY_REJECTED
    return 0
