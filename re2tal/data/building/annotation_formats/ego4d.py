"""Ego4D's moment queries: `moments_train.json` and its like. A clip is a video of its own, with times from its start.

    {"videos": [{"video_uid", "split", "clips": [{"clip_uid", "video_start_sec", "video_end_sec", "annotations":
        [{"labels": [{"label", "primary", "video_start_time", "video_end_time"}]}]}]}]}

As OpenTAD does: only primary labels, of all annotators together; clips without any are left out of train and val.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from re2tal.data.building.annotation_formats.found import Found, as_number, dictionary, items
from re2tal.data.building.annotation_formats.source import Source


def is_ego4d(source: Source) -> bool:
    """A list of videos that have clips."""
    videos = list(items(dictionary(source.json).get("videos")))
    return bool(videos) and all("clips" in dictionary(one) for one in videos)


def read_ego4d(source: Source, found: Found) -> None:
    """Add the clips."""
    for video in map(dictionary, items(source.json["videos"])):
        split = video.get("split")
        for clip in found.listed(f"{source.path.name} video {video.get('video_uid')}", video, "clips"):
            _read_clip(source, found, dictionary(clip), split if isinstance(split, str) else None)


def _read_clip(source: Source, found: Found, clip: Mapping[str, Any], split: str | None) -> None:
    name = clip.get("clip_uid")
    where = f"{source.path.name} clip {name}"
    start, end = as_number(clip.get("video_start_sec")), as_number(clip.get("video_end_sec"))
    if not isinstance(name, str) or start is None or end is None or end <= start:
        found.leave_out(where, "it has no clip_uid, video_start_sec and video_end_sec that fit")
        return
    start = max(0.0, start)
    is_unannotated = split == "test" and clip.get("annotations") is None
    labels = [
        one
        for annotation in ([] if is_unannotated else found.listed(where, clip, "annotations"))
        for one in map(dictionary, found.listed(where, dictionary(annotation), "labels"))
        if one.get("primary") is True
    ]
    if split == "test" or labels:
        found.video(name, subset=split, duration=end - start, is_known=bool(labels))
    else:
        found.leave_out(where, "it has no primary label")
    for one in labels:
        first, last = as_number(one.get("video_start_time")), as_number(one.get("video_end_time"))
        if first is None or last is None:
            found.leave_out(where, f"label {one.get('label')!r} has no video_start_time and video_end_time")
        else:
            found.action(where, name, max(0.0, first - start), last - start, one.get("label"))
