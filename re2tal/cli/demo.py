"""`re2tal demo`: write a small data set of real video files to try everything on."""

from __future__ import annotations

from pathlib import Path

from re2tal.data.demo import DemoConfig, write_demo


def demo(
    *,
    out: Path,
    seed: int = DemoConfig.seed,
    num_training: int = DemoConfig.num_training,
    num_validation: int = DemoConfig.num_validation,
    workers: int | None = None,
) -> None:
    """Write H.264 videos and ActivityNet annotations of actions that only their motion tells apart.

    Args:
        out: folder to write to: videos/*.mp4 and annotations.json
        seed: another seed, another data set of the same kind
        num_training: videos in the training subset
        num_validation: videos in the validation subset
        workers: processes that draw; by default one per core that this process may use
    """
    config = DemoConfig(num_training=num_training, num_validation=num_validation, seed=seed)
    annotations = write_demo(out, config, workers=workers)
    print(f"{num_training} training and {num_validation} validation videos in {out / 'videos'}, {annotations}")
