"""What commands print alike."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from re2tal.data.contract.manifest import Rejection
from re2tal.runs.detection import Detected
from re2tal.runs.exit_status import SOME_LEFT_OUT


def say_detected(done: Detected) -> int:
    """Print what was found where; gives the exit status."""
    say_left_out(done.rejected)
    print(f"{sum(map(len, done.found.values()))} detections in {len(done.found)} videos; {done.path}")
    if done.videos_at_max:
        print(
            f"{len(done.videos_at_max)} videos reach the limit of {done.max_per_video} detections; any more were cut "
            "(suppression.max_per_video in the run's config.json)"
        )
    return SOME_LEFT_OUT if done.rejected else 0


def say_left_out(rejected: Iterable[Rejection]) -> None:
    """Print the video files that could not be used, and why."""
    for rejection in rejected:
        print(f"left out: {rejection.video_id}: {rejection.reason}", file=sys.stderr)
