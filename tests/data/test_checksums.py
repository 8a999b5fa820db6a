"""Checksums in Matroska files: a wrong bit anywhere in a cluster is seen, and sound files have none."""

from __future__ import annotations

import av
import numpy as np
import pytest
from data.files import write_video

from re2tal.data.building.checksums import broken_clusters
from re2tal.data.building.probe import open_video
from re2tal.data.building.shown import Damage, shown_frames

CLUSTERS = {"cluster_time_limit": "1000"}


def places(path) -> list[int]:
    with av.open(str(path)) as container:
        return [packet.pos for packet in container.demux(video=0) if packet.size]


def test_one_wrong_bit_is_found_in_the_cluster_that_holds_it(tmp_path):
    path = write_video(tmp_path / "a.mkv", num_frames=240, options={"g": "30"}, container_options=CLUSTERS)
    assert broken_clusters(path) == []
    content, frames = path.read_bytes(), places(path)
    for number in np.random.default_rng(0).integers(1, len(frames), 12):
        changed = bytearray(content)
        changed[frames[number] + 20] ^= 8
        path.write_bytes(changed)
        ((start, end),) = broken_clusters(path)
        assert start < frames[number] < end
        assert changed[start : start + 4] == b"\x1f\x43\xb6\x75"


def test_a_cluster_whose_head_is_gone_is_broken_up_to_the_next_one(tmp_path):
    path = write_video(tmp_path / "a.mkv", num_frames=240, options={"g": "30"}, container_options=CLUSTERS)
    content = path.read_bytes()
    marks = [at for at in range(len(content)) if content.startswith(b"\x1f\x43\xb6\x75", at)]
    _, second, third = marks[-3:]
    path.write_bytes(content[:second] + bytes(8) + content[second + 8 :])
    assert (second, third) in broken_clusters(path)


@pytest.mark.parametrize(("name", "codec"), [("a.webm", "libvpx-vp9"), ("a.mp4", "libx264")])
def test_files_without_checksums_are_not_judged(tmp_path, name, codec):
    path = write_video(tmp_path / name, codec=codec)
    assert broken_clusters(path) == []


def test_frames_of_a_broken_cluster_are_damaged_though_they_decode(tmp_path):
    path = write_video(
        tmp_path / "a.mkv", num_frames=120, codec="mpeg4", options={"g": "30"}, container_options=CLUSTERS
    )
    content, frames = bytearray(path.read_bytes()), places(path)
    content[frames[45] - 40] ^= 1
    path.write_bytes(content)
    damage = Damage()
    with open_video(path) as (container, stream):
        assert len(list(shown_frames(container, stream, damage))) == 120
    assert 15 <= damage.corrupt < 120
