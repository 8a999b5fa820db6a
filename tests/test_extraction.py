"""Features of whole videos are those that the backbone gives by hand, window by window."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data.folders import indexed, write_shards
from data.numbered import encode_numbered

from re2tal.backbones import BackboneConfig, VideoBackbone, build_backbone
from re2tal.backbones.base import steps_mask
from re2tal.data.building.build_features import Computed
from re2tal.data.contract.members import read_content
from re2tal.data.contract.shards import ShardSet
from re2tal.data.streaming.decode import decode_frames
from re2tal.data.streaming.stream import ClipConfig
from re2tal.data.streaming.transforms import Box, crop_and_resize, normalise
from re2tal.data.streaming.windows import ResizeWhole, Slide
from re2tal.extraction import Extractor, WindowFeatures, stitch, weights_sha256
from re2tal.structures import Features

LENGTHS = {"short": 20, "even": 64, "odd": 75}
"""stored at 30 frames a second; at 15: 10, 32 and 38 samples"""
CLIPS = ClipConfig(windowing=Slide(16, frames_per_second=15.0, overlap=0.5), size=32, fit="stretch", workers=0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    videos = {name: (encode_numbered(length), indexed(length)) for name, length in LENGTHS.items()}
    return write_shards(tmp_path_factory.mktemp("videos") / "training", videos, per_shard=2)


@pytest.fixture(scope="module")
def backbone() -> VideoBackbone:
    torch.manual_seed(0)
    return build_backbone(BackboneConfig(name="swin3d_nano")).eval()


def extracted(extractor: Extractor, shards: ShardSet) -> dict[str, Computed]:
    records = [video.record for video in shards.videos]
    found = dict(zip((record.video_id for record in records), extractor.run(shards, records), strict=True))
    assert not any(isinstance(one, str) for one in found.values()), found
    return found


def by_hand(backbone: VideoBackbone, shards: ShardSet, video_id: str, samples: list[int]) -> torch.Tensor:
    """(C, T') of the stored frames 2 * sample, all valid."""
    frames = decode_frames(read_content(shards, shards.by_id[video_id]), [2 * sample for sample in samples])
    pixels = crop_and_resize(frames, Box(0, 0, *frames.shape[1:3]), size=32)
    with torch.no_grad():
        return backbone(normalise(pixels[None]), torch.ones(1, len(samples), dtype=torch.bool)).values[0]


def test_every_step_is_the_backbones_in_the_window_where_it_lies_most_inside(shards, backbone):
    found = extracted(Extractor(backbone, CLIPS, batch_size=2), shards)
    # "odd": 38 samples, 19 steps of two. Windows of 8 steps begin at steps 0, 4, 8 and 11. Step 5 has two steps after
    # it in the first and one before it in the second; step 13 two after it in the third and two before it in the last.
    parts = {start: by_hand(backbone, shards, "odd", list(range(2 * start, 2 * start + 16))) for start in (0, 4, 8, 11)}
    origin = [0] * 6 + [4] * 4 + [8] * 4 + [11] * 5
    wanted = torch.stack([parts[start][:, step - start] for step, start in enumerate(origin)], dim=1)
    torch.testing.assert_close(found["odd"].values, wanted, rtol=1e-5, atol=1e-5)
    assert (found["odd"].seconds_per_step, found["odd"].start_seconds) == (pytest.approx(2 / 15), 0.0)
    # "short": 10 samples, the last of which fills the window; its 5 steps are kept.
    padded = by_hand(backbone, shards, "short", [*range(10), *[9] * 6])
    torch.testing.assert_close(found["short"].values, padded[:, :5], rtol=1e-5, atol=1e-5)
    assert found["even"].values.shape == (backbone.out_channels, 16)


def test_windows_may_abut_and_the_last_one_still_reaches_the_end(shards, backbone):
    clips = replace(CLIPS, windowing=replace(CLIPS.windowing, overlap=0.0))
    found = extracted(Extractor(backbone, clips, batch_size=4), shards)
    first, last = (by_hand(backbone, shards, "even", list(range(start, start + 16))) for start in (0, 16))
    torch.testing.assert_close(found["even"].values, torch.cat([first, last], dim=1), rtol=1e-5, atol=1e-5)
    assert found["odd"].values.shape[1] == 19


def test_whole_videos_are_one_window_with_their_own_length_of_a_step(shards, backbone):
    clips = replace(CLIPS, windowing=ResizeWhole(num_frames=12))
    found = extracted(Extractor(backbone, clips, batch_size=2), shards)
    for name, length in LENGTHS.items():
        assert found[name].values.shape[1] == 6
        assert found[name].seconds_per_step == pytest.approx(length / 30 / 6)


def test_features_do_not_depend_on_the_size_of_the_batch_or_the_other_videos(shards, backbone):
    alone = extracted(Extractor(backbone, CLIPS, batch_size=1), shards.only(["odd"]))
    for batch_size in (2, 5):
        together = extracted(Extractor(backbone, CLIPS, batch_size=batch_size), shards)
        torch.testing.assert_close(together["odd"].values, alone["odd"].values, rtol=1e-5, atol=1e-5)


def test_a_damaged_video_gives_a_reason_and_the_others_are_extracted(shards, backbone):
    videos = tuple(replace(video, crc32=video.crc32 ^ (video.record.video_id == "even")) for video in shards.videos)
    damaged = replace(shards, videos=videos)
    found = list(Extractor(backbone, CLIPS, batch_size=3).run(damaged, [video.record for video in videos]))
    assert [isinstance(one, Computed) for one in found] == [True, False, True]
    assert "the checksum of even.mp4 is not the one in the index" in str(found[1])
    whole = extracted(Extractor(backbone, CLIPS, batch_size=3), shards)
    torch.testing.assert_close(found[2].values, whole["odd"].values, rtol=1e-5, atol=1e-5)


def test_windows_hold_whole_steps(shards, backbone):
    clips = replace(CLIPS, windowing=replace(CLIPS.windowing, num_frames=15))
    with pytest.raises(ValueError, match=r"windows of 15 frames do not hold whole steps of 2 frames; give 14"):
        list(Extractor(backbone, clips, batch_size=1).run(shards, [shards.videos[0].record]))


def test_the_backbone_is_left_in_the_mode_it_came_in_and_computes_in_evaluation_mode(shards):
    class Noted(VideoBackbone):
        out_channels, frames_per_step = 2, 4

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))
            self.modes: list[bool] = []

        def forward(self, frames, mask) -> Features:
            self.modes.append(self.training)
            steps = frames.mean(dim=(1, 3, 4)).unflatten(1, (-1, 4)).mean(2)
            return Features(steps[:, None] * self.weight[:, None], steps_mask(mask, frames_per_step=4))

    network = Noted().train()
    assert extracted(Extractor(network, CLIPS, batch_size=2), shards)["odd"].values.shape == (2, 10)
    assert set(network.modes) == {False}
    assert network.training


def test_stitching_takes_the_first_of_two_windows_that_suit_alike():
    parts = [WindowFeatures(start, torch.full((1, 4), float(start))) for start in (0, 2, 3)]
    assert stitch(parts, num_steps=7)[0].tolist() == [0, 0, 0, 2, 2, 3, 3]


def test_the_checksum_of_weights_tells_values_names_and_nothing_else(tmp_path: Path):
    one, same, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    same.load_state_dict(one.state_dict())
    assert weights_sha256(one) == weights_sha256(same) != weights_sha256(other)
    assert weights_sha256(torch.nn.Sequential(one)) != weights_sha256(one)
    assert weights_sha256(one.to(torch.bfloat16)) != weights_sha256(same)
