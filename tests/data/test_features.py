"""Feature folders: what goes in comes out, in its place in time, and what was changed is noticed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data.feature_folders import STEP, record, spec, write_features

from re2tal.data.building.build_features import Computed, FeatureBuild, FeatureShard
from re2tal.data.contract.features import interpolate, pack_features, read_features, unpack_features
from re2tal.data.contract.manifest import INDEX_NAME, MANIFEST_NAME, to_json
from re2tal.data.contract.shards import FeatureSet, open_any, open_shards
from re2tal.data.contract.verify import damage
from re2tal.data.streaming.decode import DecodeError
from re2tal.data.streaming.stream import ClipConfig, stream_clips
from re2tal.data.streaming.windows import ResizeWhole, Slide
from re2tal.structures import Action, FeatureBatch


def values(channels: int, steps: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(channels, steps, generator=torch.Generator().manual_seed(seed))


VIDEOS = {"a": values(3, 40, seed=1), "b": values(3, 7, seed=2), "c": values(3, 64, seed=3)}


@pytest.fixture
def folder(tmp_path: Path) -> FeatureSet:
    return write_features(tmp_path / "training", VIDEOS, actions=[Action(0.5, 1.5, "x")])


def test_features_come_back_as_they_were_and_manifest_and_index_say_what_they_are(folder):
    assert folder.manifest.features == spec(3)
    assert (folder.manifest.totals.videos, folder.manifest.totals.steps) == (3, 40 + 7 + 64)
    assert [video.num_steps for video in folder.videos] == [40, 7, 64]
    for video in folder.videos:
        assert torch.equal(read_features(folder, video), VIDEOS[video.record.video_id])
        assert video.record.actions == (Action(0.5, 1.5, "x"),)
    assert list(damage(folder)) == []
    assert json.loads((folder.root / MANIFEST_NAME).read_text())["format"] == "re2tal-features"


def test_half_precision_rounds_and_refuses_what_it_cannot_hold(tmp_path):
    stored = write_features(tmp_path / "half", {"a": VIDEOS["a"]}, dtype="float16")
    assert torch.equal(read_features(stored, stored.videos[0]), VIDEOS["a"].half().float())
    with pytest.raises(ValueError, match=r"a feature of 70000 does not fit into float16; .* --dtype float32"):
        pack_features(torch.full((1, 1), 70_000.0), dtype="float16")


def test_a_step_lies_on_the_timeline_in_the_middle_of_what_it_was_computed_from(tmp_path):
    # Features every 4 frames of 30 a second, from windows of 16: step j is centred on frame 4 j + 8, and stands for
    # the 4 frames around it, from 4 j + 6 on.
    stored = write_features(tmp_path / "f", {"a": VIDEOS["c"]}, seconds_per_step=4 / 30, start_seconds=6 / 30)
    config = ClipConfig(windowing=Slide(16, frames_per_second=None, overlap=0.5), workers=0)
    batches = list(stream_clips(stored, config, batch_size=1, training=False).epoch(0))
    assert [batch.window_ids for batch in batches] == [(n,) for n in range(7)]
    for batch in batches:
        assert isinstance(batch, FeatureBatch)
        first = 8 * batch.window_ids[0]
        assert torch.equal(batch.features[0], VIDEOS["c"][:, first : first + 16])
        for step in (0, 5, 15):
            middle_frame = batch.timelines[0].to_seconds(step + 0.5) * 30
            assert middle_frame == pytest.approx(4 * (first + step) + 8)


def test_a_window_longer_than_the_video_is_padded_with_zeros_and_masked(folder):
    config = ClipConfig(windowing=Slide(16, frames_per_second=1 / STEP), workers=0)
    batch = next(iter(stream_clips(folder.only(["b"]), config, batch_size=2, training=False).epoch(0)))
    assert torch.equal(batch.features[0, :, :7], VIDEOS["b"])
    assert not batch.features[0, :, 7:].any()
    assert batch.mask[0].tolist() == [True] * 7 + [False] * 9
    assert batch.valid.tolist() == [True, False]  # the second only fills the batch
    assert batch.actions == ((Action(0.5, 1.5, "x"),), ())


@pytest.mark.parametrize("length", [16, 40, 100])
def test_a_whole_video_is_resized_as_torch_resizes_sequences(folder, length):
    config = ClipConfig(windowing=ResizeWhole(length), workers=0)
    batch = next(iter(stream_clips(folder.only(["a"]), config, batch_size=1, training=False).epoch(0)))
    wanted = torch.nn.functional.interpolate(VIDEOS["a"][None], size=length, mode="linear", align_corners=False)
    torch.testing.assert_close(batch.features, wanted, rtol=1e-5, atol=1e-5)
    assert batch.timelines[0].to_seconds(float(length)) == pytest.approx(10.0)  # 40 steps of a quarter of a second


def test_rates_that_are_no_binary_numbers_still_meet_the_steps_exactly():
    positions = torch.arange(64, dtype=torch.float64).numpy() * ((1 / (1 / 7.5)) / 7.5)
    assert torch.equal(interpolate(VIDEOS["c"], positions), VIDEOS["c"])


def test_training_windows_show_steps_of_the_video_and_are_the_same_for_any_number_of_workers(folder):
    config = ClipConfig(windowing=Slide(8, frames_per_second=None), workers=0)
    alone = list(stream_clips(folder, config, batch_size=1, training=True, seed=5).epoch(3))
    helped = list(stream_clips(folder, replace(config, workers=1), batch_size=1, training=True, seed=5).epoch(3))
    assert {batch.video_ids[0] for batch in alone} == {"a", "b", "c"}
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one.features, other.features)
        assert one.timelines == other.timelines
        start = round(one.timelines[0].start_seconds / STEP)
        count = int(one.mask.sum())
        assert torch.equal(one.features[0, :, :count], VIDEOS[one.video_ids[0]][:, start : start + count])


def test_another_rate_than_that_of_the_features_is_refused(folder):
    config = ClipConfig(windowing=Slide(8, frames_per_second=8.0), workers=0)
    with pytest.raises(ValueError, match=r"frames_per_second is 8, .* features of a .* come at 4 steps per second"):
        stream_clips(folder, config, batch_size=1, training=False)


def test_damaged_features_are_noticed_when_they_are_read_and_by_verify(folder):
    video = folder.videos[0]
    path = folder.path(video.shard)
    tar = bytearray(path.read_bytes())
    tar[video.offset + video.num_bytes - 700] ^= 1
    path.write_bytes(tar)
    with pytest.raises(DecodeError, match=r"the checksum of a.safetensors is not the one in the index"):
        read_features(folder, video)
    found = list(damage(folder))
    assert len(found) == 2
    assert "sha256 is" in found[0]
    assert "a: crc32 of the features is" in found[1]
    config = ClipConfig(windowing=Slide(8, frames_per_second=None), workers=0)
    with pytest.raises(ValueError, match=r"1 clips of epoch 0 cannot be read .*checksum of a.safetensors"):
        list(stream_clips(folder, config, batch_size=1, training=False).epoch(0))


def test_a_file_that_was_cut_short_is_refused_when_the_folder_is_opened(folder):
    path = folder.path(folder.manifest.shards[0].name)
    os.truncate(path, path.stat().st_size - 512)
    with pytest.raises(ValueError, match=r"it was cut or changed; delete it, then run the re2tal features command"):
        open_any(folder.root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pack_features(VIDEOS["b"], dtype="float16"), r"holds \(3, 7\) of torch.float16, manifest and index say"),
        (pack_features(VIDEOS["b"][:2], dtype="float32"), r"holds \(2, 7\) of torch.float32, .*\(3, 7\) of float32"),
        (b"no features at all", "is no sound safetensors file"),
        (pack_features(VIDEOS["b"], dtype="float32")[:-8], "is no sound safetensors file"),
    ],
)
def test_bytes_that_are_not_these_features_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        unpack_features(content, channels=3, num_steps=7, dtype="float32")


def test_a_folder_of_features_is_not_taken_for_one_of_videos(folder, tmp_path):
    with pytest.raises(ValueError, match="holds features, and videos are wanted here"):
        open_shards(folder.root)
    other = replace(folder.manifest, version=2)
    (folder.root / MANIFEST_NAME).write_text(to_json(other))
    with pytest.raises(ValueError, match="has version 2, this program reads 1"):
        open_any(folder.root)
    (folder.root / MANIFEST_NAME).write_text(to_json(folder.manifest))
    (folder.root / INDEX_NAME).write_text("")
    with pytest.raises(ValueError, match=r"is not the one that manifest.json was written for"):
        open_any(folder.root)


SHARDS = [
    FeatureShard("shard-000000.tar", (record("a", 10.0), record("b", 1.75))),
    FeatureShard("shard-000001.tar", (record("c", 16.0),)),
]


def build(root: Path, **options) -> FeatureBuild:
    return FeatureBuild(root, "own", "training", ("x",), spec(3), **options)


def compute(asked):
    for one in asked:
        yield Computed(VIDEOS[one.video_id], STEP)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_killed_build_goes_on_with_the_missing_shards_and_gives_the_same_bytes(tmp_path):
    def killed(asked):
        yield from compute(asked[:2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "one").run(SHARDS, killed)
    assert not (tmp_path / "one" / MANIFEST_NAME).exists()
    assert not list((tmp_path / "one").glob(".shard-*"))
    asked_for = []

    def counted(asked):
        asked_for.extend(one.video_id for one in asked)
        return compute(asked)

    assert build(tmp_path / "one").run(SHARDS, counted).is_complete
    assert asked_for == ["c"]
    build(tmp_path / "two").run(SHARDS, compute)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert build(tmp_path / "two").run(SHARDS, lambda asked: iter(())).is_complete  # nothing is left to do


def test_parts_share_the_work_and_the_last_one_writes_the_manifest(tmp_path):
    first = build(tmp_path / "parts", part_index=0, num_parts=2).run(SHARDS, compute)
    assert (first.is_complete, first.num_missing_shards) == (False, 1)
    assert build(tmp_path / "parts", part_index=1, num_parts=2).run(SHARDS, compute).is_complete
    build(tmp_path / "whole").run(SHARDS, compute)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_videos_without_usable_features_are_left_out_with_the_reason(tmp_path):
    def broken(asked):
        given = {
            "a": Computed(VIDEOS["a"].index_fill(1, torch.tensor([5]), float("nan")), STEP),
            "b": "its picture is gone",
            "c": Computed(VIDEOS["c"], STEP),
        }
        return (given[one.video_id] for one in asked)

    built = build(tmp_path / "f").run(SHARDS, broken)
    reasons = {rejection.video_id: rejection.reason for rejection in built.rejected}
    assert reasons == {"a": "3 of its 120 features are not finite", "b": "its picture is gone"}
    assert [video.record.video_id for video in open_any(tmp_path / "f").videos] == ["c"]
    with pytest.raises(ValueError, match=r"none of the 3 videos can be used; the first, a: gone$"):
        build(tmp_path / "none").run(SHARDS, lambda asked: iter(["gone"] * 3))


def test_other_settings_do_not_mix_in_one_folder(tmp_path):
    build(tmp_path / "f").run(SHARDS, compute)
    with pytest.raises(ValueError, match=r"was built with features .*channels.*; give another --out, or delete"):
        replace(build(tmp_path / "f"), spec=spec(5)).run(SHARDS, compute)
