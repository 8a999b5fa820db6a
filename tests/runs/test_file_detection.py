"""Detection in video files: the same as in shards of them, whatever is wrong with some of them."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data.files import cut_short, write_sound, write_video
from data.numbered import encode_numbered
from data.served import served
from distributed.ranks import launch_ranks

from re2tal.backbones import BackboneConfig
from re2tal.cli import main
from re2tal.config import DataConfig, RunConfig, build_detector, save_config
from re2tal.data.contract.manifest import Rejection
from re2tal.data.streaming.stream import ClipConfig, stream_clips
from re2tal.data.streaming.windows import ResizeWhole, Slide
from re2tal.evaluation.results import read_results
from re2tal.evaluation.suppression import SuppressionConfig
from re2tal.inference import predict
from re2tal.localizers.pyramid.actionformer import ActionFormerConfig
from re2tal.reporting.found import FoundAction, FoundInVideo
from re2tal.runs import detection, file_detection, video_files
from re2tal.runs.detection import DetectionOptions, detect
from re2tal.runs.detector import load_detector
from re2tal.runs.file_detection import Look, detect_in_files
from re2tal.runs.video_files import encoding_for, pack_videos
from re2tal.runs.watching import Ahead
from re2tal.structures import Detections
from re2tal.training.export import write_model

CLASSES = ("jump", "run")
WINDOWINGS = {
    "slide": Slide(num_frames=16, frames_per_second=8.0),
    "whole": ResizeWhole(num_frames=16),
}


def config(windowing: Slide | ResizeWhole) -> RunConfig:
    localizer = ActionFormerConfig(
        channels=16,
        num_embedding_convs=1,
        num_stem_blocks=1,
        max_num_steps=8,
        regression_ranges=((0, 4), (4, 10_000)),
    )
    return RunConfig(
        name="tiny",
        num_steps=8,
        data=DataConfig(clips=ClipConfig(windowing=windowing, size=32, fit="stretch", workers=0)),
        backbone=BackboneConfig(name="swin3d_nano"),
        localizer=localizer,
        suppression=SuppressionConfig(max_per_video=50),
    )


@pytest.fixture(scope="module", params=list(WINDOWINGS))
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model") / request.param, WINDOWINGS[request.param])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model") / "slide", WINDOWINGS["slide"])


def model_folder(folder: Path, windowing: Slide | ResizeWhole) -> Path:
    settings = config(windowing)
    folder.mkdir()
    save_config(folder / "config.json", settings)
    torch.manual_seed(0)
    write_model(folder / "model.safetensors", build_detector(settings, CLASSES).state_dict(), classes=CLASSES)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sound videos, of 2.5 and 6 s, and one of each kind that cannot be used."""
    folder = tmp_path_factory.mktemp("my videos")
    (folder / "a.b (1) $x.mp4").write_bytes(encode_numbered(75))
    write_video(folder / "turned.mkv", num_frames=150, rate=25, rotation=90, sound=True)
    cut_short(folder / "turned.mkv", folder / "ends early.mkv", share=0.6)
    write_sound(folder / "only sound.mp4")
    (folder / "empty.mov").write_bytes(b"")
    (folder / "notes.txt").write_text("no video")
    (folder / "deep").mkdir()
    (folder / "deep" / "turned.mp4").write_bytes(encode_numbered(60))
    return folder


SOUND = ("a.b (1) $x.mp4", "turned.mkv")


def nearest(one: Detections, other: Detections) -> tuple[float, float]:
    """Of the surest ten: how far the nearest of the others is in seconds, and its score, at most."""
    seconds, scores = [], []
    for number in range(min(10, len(one))):
        distance = (other.segments - one.segments[number]).abs().amax(1) + 1e3 * (other.labels != one.labels[number])
        apart = (other.scores - one.scores[number]).abs() / one.scores[number]
        best = int((distance + 1e-3 * apart).argmin())  # of equal segments, such as whole videos, that of this score
        seconds.append(float(distance[best]))
        scores.append(float(apart[best]))
    return max(seconds), max(scores)


def test_detections_of_the_stream_are_those_of_shards_of_it(
    any_model: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards that are hardly compressed: what compression loses moves the scores of an untrained network."""
    monkeypatch.setattr(video_files, "encoding_for", lambda clips: replace(encoding_for(clips), crf=1))
    detector = load_detector(any_model, device="cpu", batch_size=2)
    clips, suppression = detector.config.data.clips, detector.config.suppression
    files = [videos / name for name in SOUND]
    shards, names, rejected = pack_videos(files, tmp_path, clips, classes=CLASSES)
    assert not rejected
    batches = stream_clips(shards, clips, batch_size=2, training=False).epoch(0)
    packed = {
        names[key]: one
        for key, one in predict(detector.network, batches, suppression=suppression, device="cpu").items()
    }
    look = Look(detector.network, detector.config, detector.device, 2)
    live = {one.name: one.detections for one in detect_in_files(look, {path: path.stem for path in files})}
    assert list(live) == list(packed)
    for name, expected in packed.items():
        assert len(live[name]) == len(expected) > 0
        seconds, scores = nearest(expected, live[name])
        assert seconds < 0.06, name  # a frame is 0.125 s
        assert scores < 0.1, name


def test_a_bad_file_is_named_and_the_others_go_on(
    model: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    with pytest.raises(SystemExit) as ended:
        main(["detect", str(videos), "--recursive", "--model", str(model), "--out", str(out), "--device", "cpu"])
    assert ended.value.code == 1
    results = read_results(out).predictions
    assert list(results) == ["a.b (1) $x", "turned.mp4", "turned.mkv"]
    said = capsys.readouterr()
    assert "left out: empty: is empty" in said.err
    assert "left out: ends early: is cut short" in said.err
    assert "left out: only sound: has no video stream, only audio" in said.err
    assert "1 files are no videos by their suffix, and were not looked at: notes.txt" in said.out
    assert "3 videos could not be used" in said.out
    assert "start s  end s  score  label" in said.out


@pytest.mark.parametrize("ranges", [True, False])
def test_videos_at_addresses_are_detected_as_files_are(
    model: Path,
    videos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    ranges: bool,
) -> None:
    monkeypatch.setenv("RE2TAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    out = tmp_path / "found.json"
    with served({"/v/page.html": b"<html>"}) as server:
        server.add(videos, "v")
        server.ranges = ranges
        names = ("turned.mkv?sig=hunter2", "none.mp4?sig=hunter2", "page.html", "ends%20early.mkv")
        addresses = [f"{server.address}/v/{name}" for name in names]
        with pytest.raises(SystemExit) as ended:
            main(["detect", *addresses, "--model", str(model), "--out", str(out), "--device", "cpu"])
        assert ended.value.code == 1
        detector = load_detector(model, device="cpu")
        actions = detector.detect(addresses[0], top=5)
        assert any(detector.stream(addresses[0], min_score=0.0))
        with pytest.raises(ValueError, match=r"none\.mp4\?\.\.\. cannot be used: status 404; check the address"):
            detector.detect(addresses[1])
    assert actions == detector.detect(videos / "turned.mkv", top=5)
    found = read_results(out)
    assert list(found.predictions) == ["turned"]
    wanted = detect(model, [videos / "turned.mkv"], wanted=DetectionOptions(tmp_path / "here.json"), device="cpu")
    assert torch.equal(found.of("turned").segments, read_results(wanted.path).of("turned").segments)
    said = capsys.readouterr()
    assert "left out: none: status 404; check the address" in said.err
    assert "left out: page: is a web page; give the address of the file itself" in said.err
    assert "left out: ends early: is cut short" in said.err
    assert "hunter2" not in said.out + said.err + out.read_text()
    assert not list((tmp_path / "cache" / "in-use").iterdir())


def test_addresses_with_one_name_are_refused(model: Path) -> None:
    with pytest.raises(ValueError, match=r"two addresses are both called https://h\.org/v\?\.\.\. in results"):
        detect(model, ["https://h.org/v?id=1", "https://h.org/v?id=2"], device="cpu")


@pytest.mark.parametrize("format_name", ["csv", "srt", "vtt", "eaf", "boris", "json"])
def test_what_is_written_is_what_was_wanted(model: Path, videos: Path, tmp_path: Path, format_name: str) -> None:
    wanted = DetectionOptions(tmp_path / "out", format_name, min_score=0.0, top=3, classes=("run",))
    done = detect(model, [videos / name for name in SOUND], wanted=wanted, device="cpu")
    assert done.num_detections == 6
    written = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    each = [f"a.b (1) $x.{format_name}", f"turned.{format_name}"]
    assert written == (each if format_name in ("srt", "vtt", "eaf") else ["out"])
    text = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert text.count("run") >= 6
    assert "jump" not in text


def test_a_run_that_is_stopped_has_written_what_it_found(
    model: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []

    def stop(video: FoundInVideo) -> str:
        shown.append(video.name)
        if len(shown) == 1:
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(detection, "SAVE_SECONDS", 1e9)
    out = tmp_path / "found.json"
    with pytest.raises(KeyboardInterrupt):
        detect(model, [videos / name for name in SOUND], wanted=DetectionOptions(out), device="cpu", say=stop)
    assert len(read_results(out).predictions) == 1
    assert "1 of 2 videos are in" in capsys.readouterr().err
    files = [videos / name for name in SOUND]
    rest = detect(model, files, wanted=DetectionOptions(out, add=True), device="cpu")
    assert (rest.num_videos, rest.num_kept) == (1, 1)
    whole = read_results(detect(model, files, wanted=DetectionOptions(tmp_path / "whole.json"), device="cpu").path)
    assert read_results(out).predictions.keys() == whole.predictions.keys()
    for name, one in whole.predictions.items():
        assert torch.equal(one.scores, read_results(out).of(name).scores)
    # The same weights, and others are found with them.
    edited = shutil.copytree(model, tmp_path / "edited") / "config.json"
    document = json.loads(edited.read_text())
    document["suppression"]["max_per_video"] = 7
    edited.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"was made with suppression .* and here it is .*'max_per_video': 7"):
        detect(edited.parent, files, wanted=DetectionOptions(out, add=True), device="cpu")


def test_wrong_wishes_are_refused_before_anything_is_looked_at(model: Path, videos: Path, tmp_path: Path) -> None:
    files = [videos / name for name in SOUND]
    for wanted, message in (
        (
            DetectionOptions(tmp_path / "x.srt"),
            r"x\.srt, one file, but srt has a file for each of the 2 videos; give a folder",
        ),
        (DetectionOptions(classes=("fly",)), r"classes has 'fly', which the model does not know; it knows jump, run"),
        (DetectionOptions(min_score=2), r"--min-score is 2; give a number from 0 to 1"),
        (DetectionOptions(Path("/dev/null"), format="json", add=True), r"/dev/null, a pipe or a device, from which"),
    ):
        with pytest.raises(ValueError, match=message):
            detect(model, files, wanted=wanted, device="cpu")
    for batch_size in (0, -2):
        with pytest.raises(ValueError, match=rf"batch_size is {batch_size}; give 1 or more"):
            detect(model, files, batch_size=batch_size, device="cpu")
    with pytest.raises(ValueError, match=r"addresses that begin with ftp: are not read; give one of http://"):
        detect(model, [Path("ftp://example.org/x.mp4")])
    with pytest.raises(ValueError, match=r"model\.safetensors is a file; give the folder that holds it"):
        detect(model / "model.safetensors", files)


def test_a_stream_of_frames_gives_what_a_file_gives(model: Path, tmp_path: Path) -> None:
    detector = load_detector(model, device="cpu")
    assert detector.frames_per_second == 8.0
    frames = np.random.default_rng(0).integers(0, 255, (90, 40, 56, 3), dtype=np.uint8)
    live = list(detector.stream(iter(frames), min_score=0.0))
    again = list(detector.stream([torch.from_numpy(one) for one in frames], min_score=0.0))
    assert live == again
    assert live
    assert max(one.end_seconds for one in live) <= 90 / 8
    with pytest.raises(ValueError, match=r"a frame has shape \(40, 56\) and type uint8; give \(H, W, 3\) uint8"):
        list(detector.stream(frames[:, :, :, 0]))


def test_a_stream_of_a_file_settles_into_its_detections(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(encode_numbered(900))
    detector = load_detector(model, device="cpu")
    scores = sorted((one.score for one in detector.detect(path)), reverse=True)
    least = scores[20]  # of at most 50, of which suppression keeps the best
    at_once = [rounded(one) for one in detector.detect(path, min_score=least)]
    assert len(at_once) == 21
    assert sorted(rounded(one) for one in detector.stream(path, min_score=least)) == sorted(at_once)


def rounded(action: FoundAction) -> tuple:
    return round(action.start_seconds, 2), round(action.end_seconds, 2), action.label, round(action.score, 4)


def test_a_whole_video_model_streams_files_only(tmp_path: Path) -> None:
    detector = load_detector(model_folder(tmp_path / "whole", WINDOWINGS["whole"]), device="cpu")
    with pytest.raises(ValueError, match=r"this model takes a video as a whole .*; give stream a video file"):
        detector.stream(iter([]))


def test_the_command_and_the_object_find_the_same(model: Path, videos: Path, tmp_path: Path) -> None:
    path = videos / SOUND[0]
    actions = load_detector(model, device="cpu").detect(path)
    detect(model, [path], wanted=DetectionOptions(tmp_path / "found.json"), device="cpu")
    written = json.loads((tmp_path / "found.json").read_text())["results"][path.stem]
    assert [[one.start_seconds, one.end_seconds, one.label, one.score] for one in actions] == [
        [*row["segment"], row["label"], row["score"]] for row in written
    ]
    few = load_detector(model, device="cpu").detect(path, top=2, classes=["run"])
    assert few == [one for one in actions if one.label == "run"][:2]


def test_two_ranks_share_the_videos(model: Path, videos: Path, tmp_path: Path) -> None:
    files = [videos / name for name in SOUND]
    command = [sys.executable, "-m", "re2tal", "detect", *map(str, files), "--model", str(model), "--device", "cpu"]
    outputs = launch_ranks([*command, "--out", str(tmp_path / "two.json")], world_size=2)
    assert "in 2 videos" in outputs[0]
    assert "in 2 videos" not in outputs[1]
    detect(model, files, wanted=DetectionOptions(tmp_path / "one.json"), device="cpu")
    assert (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "two.json"]


def test_items_are_made_ahead_and_no_more_when_nobody_wants_them() -> None:
    made, ended = [], []

    def numbers():
        try:
            for number in range(1000):
                made.append(number)
                yield number
        finally:
            ended.append(True)

    items = iter(Ahead(numbers(), depth=2))
    assert [next(items), next(items)] == [0, 1]
    items.close()
    assert ended
    assert len(made) <= 6

    def broken():
        yield 1
        raise ValueError("no more")

    items = iter(Ahead(broken(), depth=2))
    assert next(items) == 1
    with pytest.raises(ValueError, match="no more"):
        next(items)


def test_numbers_that_are_not_finite_cost_their_video(
    model: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = load_detector(model, device="cpu")
    broken = Detections(torch.tensor([[0.0, 1.0]]), torch.tensor([float("nan")]), torch.tensor([0]))
    monkeypatch.setattr(
        file_detection, "detect_windows", lambda network, batches, device: {(batches[0].video_ids[0], 0): broken}
    )
    look = Look(detector.network, detector.config, detector.device, 2)
    (one,) = detect_in_files(look, {videos / SOUND[0]: "x"})
    assert isinstance(one, Rejection)
    assert one.reason.startswith("detections hold NaN")
