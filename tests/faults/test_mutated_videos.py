"""184 damaged copies of a video: each is left out with its reason, or stored as what a player shows of it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from data.files import encoding
from data.numbered import encode_numbered

from re2tal.data.building.annotations import read_annotations
from re2tal.data.building.build import BuildConfig, build_shards
from re2tal.data.contract.members import read_content
from re2tal.data.contract.shards import open_shards
from re2tal.data.contract.verify import damage
from re2tal.data.streaming.decode import decode_frames

NUM_FRAMES, RATE = 60, 30


def mutations(whole: bytes) -> Iterator[bytes]:
    """Bytes changed in the headers, in the pictures, or anywhere; ends that are missing; stretches of zeros."""
    dice = random.Random(0)
    start, size = whole.index(b"moov"), len(whole)
    pictures = whole.index(b"mdat")
    for kind, number in (("moov", 80), ("mdat", 40), ("cut", 32), ("zeros", 32)):
        for _ in range(number):
            match kind:
                case "moov" | "mdat":
                    first = start if kind == "moov" else pictures
                    last = size if kind == "moov" else start
                    first, last = sorted((first, last)) if first < last else (first, size)
                    place = dice.randrange(first, last)
                    yield whole[:place] + bytes([whole[place] ^ 1 << dice.randrange(8)]) + whole[place + 1 :]
                case "cut":
                    yield whole[: dice.randrange(size)]
                case "zeros":
                    place, length = dice.randrange(size), dice.randrange(1, 400)
                    yield (whole[:place] + bytes(length) + whole[place + length :])[:size]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_damaged_video_is_left_out_with_a_reason_or_stored_whole(tmp_path, record_property):
    copies = list(mutations(encode_numbered(NUM_FRAMES, fps=RATE)))
    record_property("tried", len(copies))
    (tmp_path / "videos").mkdir()
    database = {}
    for number, content in enumerate(copies):
        (tmp_path / "videos" / f"v{number:03d}.mp4").write_bytes(content)
        segment = {"segment": [0.5, 1.5], "label": "run"}
        database[f"v{number:03d}"] = {"subset": "training", "duration": 2.0, "annotations": [segment]}
    path: Path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"database": database}))
    built = build_shards(
        read_annotations(path),
        videos=tmp_path / "videos",
        out=tmp_path / "shards",
        subset="training",
        config=BuildConfig(dataset="own", encoding=encoding(fps=RATE), videos_per_shard=50, workers=2),
    )
    shards = open_shards(built.folder)
    rejected = {rejection.video_id: rejection.reason for rejection in built.rejected}
    assert sorted([*shards.by_id, *rejected]) == sorted(database)
    assert all(rejected.values())
    assert list(damage(shards)) == []
    for video in shards.videos:
        # A file of another length is refused; one that lost a few pictures repeats those before them.
        assert abs(video.num_frames - NUM_FRAMES) <= 0.05 * NUM_FRAMES, video
        assert len(decode_frames(read_content(shards, video), range(video.num_frames))) == video.num_frames
