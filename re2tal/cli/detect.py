"""`re2tal detect`: find actions with a trained detector, in video files or in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from re2tal.cli.say import say_detected, say_found, say_shipped
from re2tal.runs.detection import Wanted
from re2tal.runs.detection import detect as detect_in
from re2tal.runs.model_folder import SHIPPED


def detect(
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    /,
    *,
    model: Path | None = None,
    out: Path | None = None,
    format: Literal["json", "csv", "srt", "vtt", "eaf", "boris"] | None = None,
    min_score: float | None = None,
    top: int | None = None,
    classes: tuple[str, ...] = (),
    recursive: bool = False,
    batch_size: int | None = None,
    device: str | None = None,
    max_damaged: float = 0.02,
    video_classes: Path | None = None,
    top_k: int = 2,
    fusion: Literal["product", "square-root"] = "product",
    flip: bool = False,
    shards: Path | None = None,
    videos: Path | None = None,
    run: Path | None = None,
) -> int:
    """Find actions in videos with a trained detector, and write them with their times.

    Started by torchrun, the ranks share the videos.

    Exit status 0 if all videos were looked at, 1 if some could not be used (each is named; the others are written), 2
    for wrong input, or where no video could be used, 130 when stopped by the keyboard (what was found is written).

    Args:
        paths: video files of any format and size, and folders of them; results carry their names without the suffix.
            Without any, the run's validation shards are looked at
        model: model folder or run folder: config.json and model.safetensors. Of a run that is still training, or was
            interrupted, the newest sound checkpoint is taken. Or a model's name on the hub, OWNER/NAME. Without it, the
            small model that comes with the package
        out: where to write; its suffix says the format: .json, .csv, .srt, .vtt, .eaf (ELAN), .tsv (BORIS). For srt,
            vtt and eaf of several videos it is a folder. By default MODEL/detections.json, or MODEL/results.json for
            the validation shards; for the model of the package or the hub in the working directory
        format: json is ActivityNet's layout, for re2tal evaluate; csv a table; srt and vtt are subtitles, for players;
            eaf and boris (aggregated events) are for correcting in ELAN and BORIS
        min_score: leave out what has a lower score; by default 0, and 0.3 for srt, vtt, eaf and boris
        top: write at most so many of each video, the surest ones
        classes: write only these classes
        recursive: look into the folders of folders too
        batch_size: clips in one forward; by default as in training
        device: "cpu", "cuda", "cuda:1", ...; by default an accelerator if there is one
        max_damaged: share of a video's frames that may be damaged or missing
        video_classes: scores of a classifier of whole videos that name what a class-agnostic detector finds; without
            it the results' only class is "action". JSON, {"results": {ID: [K scores]}, "class": [K names]} (CUHK,
            InternVideo; [[K logits]] for TCANet), or UntrimmedNet's .npy for THUMOS-14
        top_k: with --video-classes, each detection is written once for each of its video's so many best classes
        fusion: with --video-classes, a score is the detection's times its class's, or the square root of that, as
            published for InternVideo
        flip: look at each clip and its mirror image, and average what the network says of both; takes twice as long
        shards: folder of one subset's shards, or features, to look at instead of videos
        videos: the same as a folder in PATHS
        run: the same as --model
    """
    if model and run:
        raise ValueError("--model and --run mean the same; give one, the folder of a trained detector")
    chosen = model or run or SHIPPED
    if chosen == SHIPPED:
        say_shipped()
    wanted = Wanted(out, format, min_score, top, classes, video_classes, top_k, fusion, flip)
    done = detect_in(
        chosen,
        (*paths, *([videos] if videos else ())),
        recursive=recursive,
        shards=shards,
        wanted=wanted,
        batch_size=batch_size,
        device=device,
        max_damaged=max_damaged,
        say=say_found,
    )
    return say_detected(done)
