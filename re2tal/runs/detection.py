"""Detect actions with a trained detector, in video files or in shards.

video files -> decoded once, as a stream -> windows -> results, video by video
shards      -> windows of all videos -> results
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from re2tal.data.building.probe import MAX_DAMAGED
from re2tal.data.contract.manifest import Rejection
from re2tal.distributed import World
from re2tal.inference import average_flips, predict
from re2tal.options import SHARE, check
from re2tal.progress import Progress
from re2tal.reporting.found import FoundInVideo
from re2tal.runs.detection_job import Detected, DetectionOptions, Job
from re2tal.runs.detection_sources import batch_of, batches_with_bar, check_looks_at_videos
from re2tal.runs.devices import device_of, joined_ranks
from re2tal.runs.file_detection import Look, detect_in_files, weights_of
from re2tal.runs.model_folder import SHIPPED
from re2tal.runs.model_folder_hub import find_model
from re2tal.runs.video_files import encoding_for
from re2tal.training.config import DTYPES

SAVE_SECONDS = 10.0
"""What is found is written at least so often, while videos are looked at."""


def detect(
    model: Path = SHIPPED,
    paths: Sequence[Path | str] = (),
    *,
    recursive: bool = False,
    shards: Path | None = None,
    wanted: DetectionOptions | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    max_damaged: float = MAX_DAMAGED,
    say: Callable[[FoundInVideo], str] | None = None,
) -> Detected:
    """Detect actions in video files, folders of them and addresses, or in shards; write what is found.

    Every rank calls this. The arguments are those of `re2tal detect`; `say` makes of each video what is printed.
    """
    wanted = wanted or DetectionOptions()
    check("--max-damaged", max_damaged, SHARE)
    with joined_ranks() as world:
        model, asked = find_model(model), model
        if not paths and shards is None and model == SHIPPED:
            raise ValueError("the model that comes with the package has no videos of its own; give videos to look at")
        # Never into the installed package, nor into the hub's cache.
        home = Path() if model == SHIPPED or model != asked else model
        job = Job.prepared(home, model, paths, shards, wanted, world, recursive=recursive)
        if paths:
            # Before the network is built, which takes seconds.
            encoding_for(job.trained.config.data.clips)  # raises where the rate is not known
        if wanted.flip:
            check_looks_at_videos(model, job.trained.config, asked="flip, of frames,")
        chosen = device_of(world, device)
        config = job.trained.config
        clips = batch_of(batch_size, config)
        network = job.trained.network().to(chosen, DTYPES[config.engine.precision])
        if wanted.flip:
            average_flips(network)
        look = Look(network, config, chosen, clips, job.early, max_damaged)
        if job.shards is None:
            _look_at_files(job, look, world, say)
        else:
            _look_at_shards(job, look, world)
        return job.done(world)


def _look_at_files(job: Job, look: Look, world: World, say: Callable[[FoundInVideo], str] | None) -> None:
    # Every n-th file, as neighbours in a folder are often equally long.
    mine = dict(list(job.files.names.items())[world.rank :: world.world_size])
    progress = Progress(sum(weights_of(mine).values()), shown=world.is_main)
    saved, cost = time.monotonic(), 0.0
    try:
        for one in detect_in_files(look, mine, progress=progress):
            if isinstance(one, Rejection):
                job.rejected.append(one)
                continue
            written = job.add(one)
            if say is not None:
                progress.say(say(written))
            # Results are written whole each time; where that takes long, it is done less often, for a twentieth of the
            # time.
            if (now := time.monotonic()) - saved > max(SAVE_SECONDS, 20 * cost):
                job.results.save()
                saved = time.monotonic()
                cost = saved - now
    except KeyboardInterrupt:
        # Hours of looking are not lost to Ctrl-C.
        if job.found:
            job.results.write()
            print(
                f"{len(job.found)} of {len(mine)} videos are in {job.results.out}; the same command with --add goes on "
                "with the others",
                file=sys.stderr,
            )
        raise
    finally:
        progress.close()


def _look_at_shards(job: Job, look: Look, world: World) -> None:
    assert job.shards is not None
    batches = batches_with_bar(job.shards, look.config.data, batch_size=look.batch_size, world=world)
    found = predict(look.network, batches, suppression=look.config.suppression, device=look.device)
    # `predict` has brought what all ranks found to rank 0.
    if not world.is_main:
        return
    for video_id, detections in found.items():
        seconds = job.shards.by_id[video_id].record.duration_seconds
        chosen = look.selection.after(detections)
        job.add(FoundInVideo(video_id, None, seconds, chosen, job.trained.classes))
