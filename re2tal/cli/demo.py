"""`re2tal demo`: write a small data set of real video files to try everything on."""

from __future__ import annotations

from pathlib import Path

from re2tal.data.building.demo import DemoConfig
from re2tal.runs.demo_data import write_videos


def demo(
    *,
    out: Path,
    seed: int = DemoConfig.seed,
    num_training: int | None = None,
    num_validation: int | None = None,
    workers: int | None = None,
    clips: bool = False,
) -> None:
    """Write H.264 videos and ActivityNet annotations of actions that only their motion tells apart.

    Args:
        out: folder to write to: videos/*.mp4 and annotations.json
        seed: another seed, another data set of the same kind
        num_training: videos in the training subset; 96 by default, or 480 clips
        num_validation: videos in the validation subset; 48 by default, or 60 clips
        workers: processes that draw; by default one per core that this process may use
        clips: write trimmed clips instead, each of one action, as clips/SUBSET/CLASS/*.mp4
    """
    write_videos(out, seed=seed, num_training=num_training, num_validation=num_validation, workers=workers, clips=clips)
