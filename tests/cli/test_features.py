"""`re2tal features` from shards and .npy files to folders that open."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data.folders import indexed, write_shards
from data.numbered import encode_numbered

from re2tal.backbones import BackboneConfig
from re2tal.cli import main
from re2tal.cli.features import features as store
from re2tal.data.contract.feature_manifest import Extracted, FramesPerStep, Packed, SecondsPerStep, StepsPerVideo
from re2tal.data.contract.features import read_features
from re2tal.data.contract.manifest import MANIFEST_NAME
from re2tal.data.contract.shards import FeatureSet, open_any, open_shards
from re2tal.runs.feature_extraction import Extract, extract
from re2tal.runs.feature_packing import Pack, pack
from re2tal.structures import Action

NANO = BackboneConfig(name="swin3d_nano")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Three videos of 1 to 2 seconds, in two shards."""
    given = {
        name: (encode_numbered(length), indexed(length, actions=[Action(0.2, 0.9, "x")]))
        for name, length in (("a", 30), ("b", 45), ("c", 60))
    }
    return write_shards(tmp_path_factory.mktemp("shards") / "training", given, per_shard=2).root


def options(videos: Path, out: Path, **changes) -> Extract:
    given = {"window_frames": 16, "fps": 15.0, "size": 32, "fit": "stretch", "workers": 0, "device": "cpu"}
    return Extract(shards=(videos,), out=out, backbone=NANO, **{**given, **changes})


def features(folder: Path) -> FeatureSet:
    opened = open_any(folder)
    assert isinstance(opened, FeatureSet)
    return opened


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_extraction_writes_a_folder_that_says_what_made_it(videos, tmp_path, capsys):
    assert store(options(videos, tmp_path, dtype="float32")) == 0
    found = features(tmp_path / "training")
    spec = found.manifest.features
    assert (spec.channels, spec.dtype, spec.grid) == (96, "float32", SecondsPerStep(2 / 15))
    assert isinstance(spec.origin, Extracted)
    assert (spec.origin.backbone, spec.origin.weights) == ("swin3d_nano", "random, seed 0")
    assert spec.origin.shards_sha256 == open_shards(videos).manifest_sha256
    assert [video.num_steps for video in found.videos] == [8, 12, 15]
    assert [video.record for video in found.videos] == [video.record for video in open_shards(videos).videos]
    out = capsys.readouterr().out
    assert "a step per 0.133333 s, 96 channels in float32 from swin3d_nano (random, seed 0)" in out
    with pytest.raises(SystemExit) as end:
        main(["shards", "verify", str(tmp_path / "training")])
    assert end.value.code == 0
    assert "3 videos in 2 shards, every byte as it was built" in capsys.readouterr().out


def test_two_parts_make_what_one_makes_and_other_weights_make_another_folder(videos, tmp_path):
    for part in ("1/2", "0/2"):
        extract(options(videos, tmp_path / "parts", part=part))
    extract(options(videos, tmp_path / "whole"))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"was built with features .*; give another --out, or delete that folder"):
        extract(options(videos, tmp_path / "whole", seed=1))


def test_videos_that_cannot_be_read_are_reported_and_counted(videos, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in videos.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    video = open_shards(videos).by_id["b"]
    tar = bytearray((damaged / video.shard).read_bytes())
    tar[video.offset + video.num_bytes - 1000] ^= 1
    (damaged / video.shard).write_bytes(tar)
    assert store(options(damaged, tmp_path / "out")) == 3
    assert "rejected b: " in capsys.readouterr().err
    assert sorted(features(tmp_path / "out" / "training").by_id) == ["a", "c"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"whole": 16}, "whole = 16 excludes window_frames and fps"),
        ({"window_frames": 15}, "windows of 15 frames do not hold whole steps of 2 frames"),
        ({"fps": 60.0}, "frames_per_second is 60.0, but a is stored at 30"),
        ({"part": "2/2"}, "--part is '2/2'; give i/n"),
        ({"run": Path("nowhere")}, "nowhere/config.json is not a file"),
        ({"shards": ()}, "no folder of shards was named"),
    ],
)
def test_options_without_a_meaning_are_refused(videos, tmp_path, changes, message):
    given = options(videos, tmp_path, **{key: value for key, value in changes.items() if key != "shards"})
    if "run" in changes or "shards" in changes:
        given = Extract(
            shards=changes.get("shards", (videos,)), out=tmp_path, run=changes.get("run"), backbone=BackboneConfig()
        )
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        extract(given)


def write_given(folder: Path, *, fps: dict[str, float], steps: dict[str, int]) -> dict[str, np.ndarray]:
    """A folder of .npy files (T, 6) and annotations.json; every video lasts as its steps of 4 and 16 frames do."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays, database = {}, {}
    for number, (name, num_steps) in enumerate(steps.items()):
        arrays[name] = np.random.default_rng(number).standard_normal((num_steps, 6)).astype(np.float32)
        np.save(folder / f"{name}.npy", arrays[name])
        database[name] = {
            "subset": "Validation" if name.startswith("v") else "Training",
            "duration": (4 * (num_steps - 1) + 16) / fps[name],
            "fps": fps[name],
            "annotations": [{"segment": [0.5, 1.5], "label": "run"}],
        }
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    return arrays


STEPS = {"a": 40, "b": 33, "v": 51}


def test_published_layouts_are_packed_with_the_middle_of_their_windows_as_their_time(tmp_path, capsys):
    fps = {"a": 30.0, "b": 25.0, "v": 30.0}
    arrays = write_given(tmp_path / "i3d", fps=fps, steps=STEPS)
    given = {"features": tmp_path / "i3d", "annotations": tmp_path / "i3d" / "annotations.json"}
    status = pack(Pack(**given, out=tmp_path / "out", stride_frames=4, window_frames=16, dtype="float32"))
    assert status == 0
    training, validation = (features(tmp_path / "out" / name) for name in ("training", "validation"))
    assert training.classes == validation.classes == ("run",)
    spec = training.manifest.features
    assert (spec.channels, spec.grid, spec.origin.window_frames) == (6, FramesPerStep(4), 16)
    for folder in (training, validation):
        for video in folder.videos:
            name = video.record.video_id
            assert torch.equal(read_features(folder, video), torch.from_numpy(arrays[name]).T)
            # Step 0 was computed from frames 0 to 15: its middle is 8 frames after the start.
            assert video.start_seconds + 0.5 * video.seconds_per_step == pytest.approx(8 / fps[name])
            assert video.seconds_per_step == pytest.approx(4 / fps[name])
    assert "a step per 4 frames, 6 channels in float32 from another program" in capsys.readouterr().out


def test_channels_first_whole_videos_and_one_rate_for_all(tmp_path):
    steps = dict.fromkeys(STEPS, 20)
    arrays = write_given(tmp_path / "f", fps=dict.fromkeys(STEPS, 30.0), steps=steps)
    for name, array in arrays.items():
        np.save(tmp_path / "f" / f"{name}.npy", np.asfortranarray(array.T.astype(np.float64)))
    given = {"features": tmp_path / "f", "annotations": tmp_path / "f" / "annotations.json", "layout": "ct"}
    assert pack(Pack(**given, out=tmp_path / "whole", resized=20, dtype="float32", subsets=("training",))) == 0
    whole = features(tmp_path / "whole" / "training")
    assert whole.manifest.features.grid == StepsPerVideo(20)
    video = whole.by_id["a"]
    assert (video.start_seconds, video.seconds_per_step * 20) == (0.0, pytest.approx(video.record.duration_seconds))
    torch.testing.assert_close(read_features(whole, video), torch.from_numpy(arrays["a"]).T)
    assert pack(Pack(**given, out=tmp_path / "fps", stride_frames=4, window_frames=16, fps=30.0)) == 0
    manifest = features(tmp_path / "fps" / "validation").manifest
    assert manifest.features.grid == SecondsPerStep(4 / 30)
    assert isinstance(manifest.features.origin, Packed)
    assert manifest.features.origin.fps == 30.0


def test_files_that_cannot_be_used_are_left_out_with_the_reason(tmp_path, capsys):
    steps = {name: 40 for name in "abcdefgh"}
    write_given(tmp_path, fps=dict.fromkeys(steps, 30.0), steps=steps)
    np.save(tmp_path / "b.npy", np.full((40, 6), np.nan, dtype=np.float32))
    np.save(tmp_path / "c.npy", np.array([{"code": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "d.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-100])
    np.save(tmp_path / "e.npy", np.zeros((400, 6), dtype=np.float32))
    np.save(tmp_path / "f.npy", np.zeros((40, 7), dtype=np.float32))
    (tmp_path / "g.npy").unlink()
    given = {"features": tmp_path, "annotations": tmp_path / "annotations.json", "out": tmp_path / "out"}
    assert pack(Pack(**given, stride_frames=4, window_frames=16)) == 3
    found = features(tmp_path / "out" / "training")
    assert sorted(found.by_id) == ["a", "h"]
    reasons = {rejection.video_id: rejection.reason for rejection in found.manifest.rejected}
    assert reasons["b"] == "240 of its 240 features are not finite"
    assert "c.npy is no sound .npy file of numbers" in reasons["c"]
    assert "d.npy is no sound .npy file of numbers" in reasons["d"]
    assert "400 steps of 4 frames at 30 frames per second end at 53.73 s, the annotation file says 5.73" in reasons["e"]
    assert reasons["f"] == "has 7 channels and 40 steps; wanted 6 channels"
    assert reasons["g"] == "there is no file of this name"
    assert "6 of 8 videos cannot be used" in capsys.readouterr().err


def test_a_rate_that_is_no_number_costs_its_video_alone(tmp_path):
    write_given(tmp_path, fps={"a": 30.0, "b": 30.0}, steps={"a": 40, "b": 33})
    path = tmp_path / "annotations.json"
    path.write_text(path.read_text().replace('"fps": 30.0', '"fps": "fast"', 1))
    assert pack(Pack(tmp_path, path, tmp_path / "out", stride_frames=4, window_frames=16)) == 3
    (left_out,) = features(tmp_path / "out" / "training").manifest.rejected
    assert (left_out.video_id, left_out.reason[-10:]) == ("a", "give --fps")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give --stride-frames and --window-frames"),
        ({"stride_frames": 4}, "give --stride-frames and --window-frames"),
        ({"stride_frames": 0, "window_frames": 16}, "--stride-frames is 0; give 1 or more"),
        ({"resized": 20, "fps": 30.0}, "--resized excludes"),
        ({"resized": 20, "suffix": "_rgb"}, r"looked for a_rgb\.npy \(or .*there are 3 files such as a\.npy, b\.npy"),
        ({"resized": 20, "layout": "ct"}, r"with --layout ct, 3 files have 3 different numbers of channels.*layout tc"),
        ({"resized": 20, "features": Path("nowhere")}, "nowhere is not a folder"),
        ({"resized": 20, "subsets": ("test",)}, "no video belongs to subset 'test'"),
        ({"resized": 7}, "none of the 3 videos can be used"),
    ],
)
def test_what_cannot_be_packed_is_refused(tmp_path, changes, message):
    steps = {"a": 40, "b": 33, "c": 51}
    write_given(tmp_path, fps=dict.fromkeys(steps, 30.0), steps=steps)
    given = {"features": tmp_path, "annotations": tmp_path / "annotations.json", "out": tmp_path / "out", **changes}
    with pytest.raises(ValueError, match=message):
        pack(Pack(**given))
    assert not list((tmp_path / "out").rglob(MANIFEST_NAME))


def save(path: Path, values: np.ndarray) -> None:
    """Write (T, C) in the format that the suffix names."""
    match path.suffix:
        case ".npy":
            np.save(path, values)
        case ".npz":
            np.savez_compressed(path, feats=values, stride=np.array(4), meta=np.array([{"a": 1}], dtype=object))
        case ".pt":
            torch.save({"epoch": 3, "rgb": torch.from_numpy(values).bfloat16(), "length": torch.tensor(4)}, path)
        case ".pth":
            torch.save(torch.from_numpy(values)[None, :, :, None, None], path)
        case ".h5":
            with pytest.importorskip("h5py").File(path, "w") as file:
                file["a/c3d_features"] = values
        case ".csv":
            header = ",".join(f"rgb{number}" for number in range(values.shape[1]))
            np.savetxt(path, values, delimiter=",", header=header, comments="", fmt="%.9g")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".pth", ".h5", ".csv"])
def test_every_format_gives_the_numbers_that_were_stored(tmp_path, suffix):
    steps = {"a": 40, "b": 33}
    arrays = write_given(tmp_path, fps=dict.fromkeys(steps, 30.0), steps=steps)
    for name, values in arrays.items():
        (tmp_path / f"{name}.npy").unlink()
        arrays[name] = torch.from_numpy(values).bfloat16().float().numpy()  # which all formats here can hold
        save(tmp_path / f"{name}{suffix}", arrays[name])
    given = {"features": tmp_path, "annotations": tmp_path / "annotations.json", "out": tmp_path / "out"}
    assert pack(Pack(**given, stride_frames=4, window_frames=16, dtype="float32")) == 0
    found = features(tmp_path / "out" / "training")
    for video in found.videos:
        assert torch.equal(read_features(found, video), torch.from_numpy(arrays[video.record.video_id]).T)


def test_actionformers_file_packs_into_the_subsets_that_recipes_look_for(tmp_path, capsys):
    database = {
        f"video_{kind}_{number:07d}": {
            "subset": subset,
            "duration": (4 * (steps - 1) + 16) / 30,
            "fps": 30.0,
            "annotations": [{"label": "Billiards", "segment": [0.1, 0.9], "segment(frames)": [3, 27], "label_id": 2}],
        }
        for kind, subset, number, steps in (("validation", "Validation", 51, 40), ("test", "Test", 4, 33))
    }
    for number, (name, entry) in enumerate(database.items()):
        steps = round((entry["duration"] * 30 - 16) / 4) + 1
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(number).random((steps, 8), dtype=np.float32))
    path = tmp_path / "thumos14.json"
    path.write_text(json.dumps({"version": "Thumos14-30fps", "database": database}))
    given = {"features": tmp_path, "annotations": path, "out": tmp_path / "out", "dataset": "thumos14"}
    assert pack(Pack(**given, stride_frames=4, window_frames=16)) == 0
    assert list(features(tmp_path / "out" / "training").by_id) == ["video_validation_0000051"]
    assert list(features(tmp_path / "out" / "validation").by_id) == ["video_test_0000004"]
    assert (
        "subset 'validation' as 'training' and 'test' as 'validation', as recipes call them" in capsys.readouterr().out
    )


def write_without_durations(folder: Path, *, steps: dict[str, int]) -> dict[str, Path]:
    write_given(folder, fps=dict.fromkeys(steps, 30.0), steps=steps)
    path = folder / "annotations.json"
    document = json.loads(path.read_text())
    for entry in document["database"].values():
        del entry["duration"]
    path.write_text(json.dumps(document))
    return {"features": folder, "annotations": path, "out": folder / "out"}


def test_without_durations_the_last_window_ends_the_video_and_a_damaged_file_is_left_out(tmp_path):
    given = write_without_durations(tmp_path, steps={"a": 40, "b": 33, "c": 51})
    (tmp_path / "c.npy").write_bytes((tmp_path / "c.npy").read_bytes()[:-10])
    assert pack(Pack(**given, stride_frames=4, window_frames=16, max_rejected=0.5)) == 0
    found = features(tmp_path / "out" / "training")
    seconds = {name: video.record.duration_seconds for name, video in found.by_id.items()}
    assert seconds == {"a": pytest.approx(172 / 30), "b": pytest.approx(144 / 30)}
    assert [one.video_id for one in found.manifest.rejected] == ["c"]
    with pytest.raises(ValueError, match=r"duration is None: .* features of --resized videos do not tell it"):
        pack(Pack(**{**given, "out": tmp_path / "other"}, resized=20))


def test_the_axes_are_told_apart_by_the_durations_or_not_at_all(tmp_path, capsys):
    steps = dict.fromkeys("ab", 40)
    arrays = write_given(tmp_path, fps=dict.fromkeys(steps, 30.0), steps=steps)
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array.T)
    given = {"features": tmp_path, "annotations": tmp_path / "annotations.json"}
    assert pack(Pack(**given, out=tmp_path / "ct", stride_frames=4, window_frames=16, dtype="float32")) == 0
    assert "files are read as (C, T), 6 channels" in capsys.readouterr().out
    found = features(tmp_path / "ct" / "training")
    assert torch.equal(read_features(found, found.by_id["b"]), torch.from_numpy(arrays["b"]).T)
    for name in steps:
        np.save(tmp_path / f"{name}.npy", np.zeros((40, 40), dtype=np.float32))
    with pytest.raises(ValueError, match=r"2 files, of shape 40x40, do not tell which axis is time; give --layout tc"):
        pack(Pack(**given, out=tmp_path / "out", stride_frames=4, window_frames=16))


def test_prefix_suffix_and_format_choose_the_files(tmp_path):
    steps = {"a": 40, "b": 33}
    arrays = write_given(tmp_path, fps=dict.fromkeys(steps, 30.0), steps=steps)
    for name, values in arrays.items():
        (tmp_path / f"{name}.npy").unlink()
        np.save(tmp_path / f"v_{name}_rgb.npy", values + 1)
        np.save(tmp_path / f"v_{name}_flow.npy", values)
        save(tmp_path / f"v_{name}_rgb.csv", values)
    given = {"features": tmp_path, "annotations": tmp_path / "annotations.json", "out": tmp_path / "out"}
    given |= {"stride_frames": 4, "window_frames": 16, "dtype": "float32"}
    with pytest.raises(ValueError, match=r"v_a_rgb\.csv and v_a_rgb\.npy are files of one video; keep one"):
        pack(Pack(**given, prefix="v_", suffix="_rgb"))
    assert pack(Pack(**given, prefix="v_", suffix="_rgb.npy")) == 0
    found = features(tmp_path / "out" / "training")
    assert torch.equal(read_features(found, found.by_id["a"]), torch.from_numpy(arrays["a"] + 1).T)


def test_one_hdf5_file_may_hold_all_videos_under_their_names(tmp_path):
    h5py = pytest.importorskip("h5py")
    steps = {"my video.v2": 40, "b": 33, "c": 35}
    arrays = write_given(tmp_path, fps=dict.fromkeys(steps, 30.0), steps=steps)
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file["v_my video.v2/c3d_features"] = arrays["my video.v2"]
        file["v_b"] = arrays["b"]
        file["v_c"] = h5py.ExternalLink("other.h5", "x")
        file["stray/c3d_features"] = arrays["c"]
    given = {"features": tmp_path / "all.h5", "annotations": tmp_path / "annotations.json", "out": tmp_path / "out"}
    assert pack(Pack(**given, stride_frames=4, window_frames=16, dtype="float32")) == 3
    found = features(tmp_path / "out" / "training")
    assert {one.video_id: one.reason for one in found.manifest.rejected} == {"c": "there is no file of this name"}
    for video in found.videos:
        assert torch.equal(read_features(found, video), torch.from_numpy(arrays[video.record.video_id]).T)
    with pytest.raises(ValueError, match=r"annotations\.json is not a folder; give .*, or one \.h5 file"):
        pack(Pack(**{**given, "features": given["annotations"]}, stride_frames=4, window_frames=16))


def test_a_file_is_never_two_videos_and_no_video_is_chosen_among_two_files(tmp_path):
    steps = {"a": 40, "v_a": 40, "v_g": 38, "b": 33, "c": 35, "d": 36}
    write_given(tmp_path, fps=dict.fromkeys(steps, 30.0), steps=steps)
    (tmp_path / "a.npy").unlink()
    np.savez(tmp_path / "v_b.npz", np.zeros((33, 6), np.float32))
    (tmp_path / "e.npy").symlink_to("x" * 300)
    given = {"features": tmp_path, "annotations": tmp_path / "annotations.json", "out": tmp_path / "out"}
    assert pack(Pack(**given, stride_frames=4, window_frames=16)) == 3
    training, validation = (features(tmp_path / "out" / name) for name in ("training", "validation"))
    assert (sorted(training.by_id), sorted(validation.by_id)) == (["c", "d"], ["v_g"])
    shared = "v_a.npy would be video 'a' and video 'v_a'; keep one of them"
    assert {one.video_id: one.reason for one in (*training.manifest.rejected, *validation.manifest.rejected)} == {
        "a": shared,
        "v_a": shared,
        "b": "b.npy and v_b.npz are files of one video; keep one of them",
    }
    # Nor where one of the two subsets is packed alone.
    alone = {**given, "out": tmp_path / "alone", "subsets": ("training",)}
    assert pack(Pack(**alone, stride_frames=4, window_frames=16)) == 3
    assert sorted(features(tmp_path / "alone" / "training").by_id) == ["c", "d"]


def test_blocked_videos_are_left_out_without_a_rejection(tmp_path, capsys):
    steps = {"a": 40, "b": 33, "c": 35}
    write_given(tmp_path, fps=dict.fromkeys(steps, 30.0), steps=steps)
    (tmp_path / "blocked.json").write_text('["v_b.mp4", "e"]')
    given = {"features": tmp_path, "annotations": tmp_path / "annotations.json", "out": tmp_path / "out"}
    assert pack(Pack(**given, stride_frames=4, window_frames=16, blocked=tmp_path / "blocked.json")) == 0
    found = features(tmp_path / "out" / "training")
    assert (sorted(found.by_id), found.manifest.rejected) == (["a", "c"], ())
    assert "blocked.json: 1 of 2 ids to leave out are listed nowhere: 'e'" in capsys.readouterr().err


def test_features_of_another_network_replace_those_of_the_same_size(tmp_path):
    arrays = write_given(tmp_path / "f", fps=dict.fromkeys(STEPS, 30.0), steps=STEPS)
    given = {"features": tmp_path / "f", "annotations": tmp_path / "f" / "annotations.json", "out": tmp_path / "out"}
    again = Pack(**given, stride_frames=4, window_frames=16, dtype="float32", subsets=("training",))
    assert pack(again) == 0
    for name, array in arrays.items():
        np.save(tmp_path / "f" / f"{name}.npy", array + 1)
    assert pack(again) == 0
    found = features(tmp_path / "out" / "training")
    for video in found.videos:
        assert torch.equal(read_features(found, video), torch.from_numpy(arrays[video.record.video_id] + 1).T)


def test_a_subset_without_any_file_is_refused_before_the_others_are_packed(tmp_path):
    steps = {"a": 40, "b": 33, "v": 51}
    write_given(tmp_path, fps=dict.fromkeys(steps, 30.0), steps=steps)
    (tmp_path / "v.npy").unlink()
    given = {"features": tmp_path, "annotations": tmp_path / "annotations.json", "out": tmp_path / "out"}
    with pytest.raises(ValueError, match=r"no video of subset 'validation' has features in .*; choose with --subsets"):
        pack(Pack(**given, stride_frames=4, window_frames=16))
    assert not (tmp_path / "out").exists()
