"""`re2tal classify`: what trimmed videos show, by a trained recognizer, and how often it is right."""

from __future__ import annotations

from pathlib import Path

from re2tal.cli.say import say_left_out
from re2tal.runs import classification
from re2tal.runs.exit_status import SOME_LEFT_OUT


def classify(
    *,
    run: Path,
    videos: Path | None = None,
    shards: Path | None = None,
    out: Path | None = None,
    top: int = 3,
    batch_size: int | None = None,
    device: str | None = None,
) -> int:
    """Write the probabilities of all classes to a JSON that `re2tal evaluate` and `re2tal detect --video-classes` read.

    Exit status 1 if some videos could not be used.

    Args:
        run: folder of a recognizer's training run: config.json and model.safetensors
        videos: folder of trimmed video files, of any format and size; each one's best classes are printed
        shards: folder of one subset's shards instead, by default the run's validation shards; top-1, top-5 and mean
            class accuracy are printed
        out: JSON to write; by default RUN/results.json, or RUN/classes.json for other videos than the run's
        top: how many classes of each of --videos to print, at most
        batch_size: clips in one forward; by default as in training
        device: "cpu", "cuda", "cuda:1", ...; by default an accelerator if there is one
    """
    done = classification.classify(
        run, videos=videos, shards=shards, out=out, top=top, batch_size=batch_size, device=device
    )
    say_left_out(done.rejected)
    print(f"{done.about}{len(done.scores)} videos; {done.path}")
    return SOME_LEFT_OUT if done.rejected else 0
