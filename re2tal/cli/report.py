"""`re2tal report`: a page with the mAP table, the curves and a timeline per video."""

from __future__ import annotations

from pathlib import Path

from re2tal.runs.page import write_report


def report(
    *, run: Path, predictions: Path | None = None, annotations: Path | None = None, max_videos: int = 100
) -> None:
    """Write RUN/report/index.html, and the pictures in it as PNG files beside it.

    Args:
        run: folder of a training run
        predictions: results JSON to show; by default RUN/results.json, which training wrote
        annotations: annotation JSON with the true actions; by default those in the run's validation shards
        max_videos: draw timelines of the first so many videos
    """
    page, scores = write_report(run, predictions=predictions, annotations=annotations, max_videos=max_videos)
    if scores is None:
        print(f"not scored: no predicted video is among those with known actions, --annotations gives others; {page}")
        return
    print(f"average mAP {100 * scores.average_map:.2f} % (protocol {scores.protocol}); {page}")
    print(scores.coverage.facts())
    for note in scores.coverage.notes():
        print(f"note: {note}")
