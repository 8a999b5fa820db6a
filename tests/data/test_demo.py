import json
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from itertools import pairwise
from unittest.mock import Mock

import av
import numpy as np
import pytest
from data.workers import interrupted

from re2tal.cli.demo import demo
from re2tal.data.building.annotations import read_annotations
from re2tal.data.building.demo import DemoConfig, _in_processes, write_demo, write_demo_clips
from re2tal.data.building.demo_scenes import (
    CLASSES,
    CLIP_SECONDS,
    NUM_DOTS,
    RATES,
    SIZES,
    Scene,
    draw_clip,
    draw_scene,
)
from re2tal.runs.lock import locked

SMALL = DemoConfig(num_training=2, num_validation=2, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo")
    write_demo(path, SMALL, workers=2)
    return path


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(subset="training", number=number, seed=0) for number in range(40)]


def frames_at(scene: Scene, seconds: np.ndarray) -> np.ndarray:
    return np.stack([scene.frame(int(second * scene.rate)) for second in seconds])


def shift_between(earlier: np.ndarray, later: np.ndarray) -> np.ndarray:
    """(right, down) by which what stands out of the picture moved, in pixels, on the torus: the peak of the circular
    correlation of the two sets of pixels that differ from the picture's middle colour."""
    masks = [abs(frame.astype(float) - np.median(frame, axis=(0, 1))).max(-1) > 60 for frame in (earlier, later)]
    spectra = [np.fft.fft2(mask) for mask in masks]
    correlation = np.fft.ifft2(spectra[1] * spectra[0].conj()).real
    height, width = correlation.shape
    down, right = np.unravel_index(correlation.argmax(), correlation.shape)
    return np.array([(right + width // 2) % width - width // 2, (down + height // 2) % height - height // 2])


DIRECTIONS = {"slide left": (-1, 0), "slide right": (1, 0), "slide up": (0, -1), "slide down": (0, 1)}
TURNS = {"circle clockwise": 1, "circle anticlockwise": -1}


def told_by_motion(scene: Scene, start_seconds: float, end_seconds: float) -> str:
    """The class, from the shifts between frames a quarter of a second apart."""
    frames = frames_at(scene, np.arange(start_seconds + 0.05, end_seconds - 0.05, 0.25))
    shifts = np.array([shift_between(*pair) for pair in pairwise(frames)], dtype=float)
    mean = shifts.mean(0)
    if np.hypot(*mean) > 0.8 * np.hypot(*shifts.T).mean():  # straight: the shifts do not cancel
        return max(DIRECTIONS, key=lambda label: float(mean @ DIRECTIONS[label]))
    turning = np.median(shifts[:-1, 0] * shifts[1:, 1] - shifts[:-1, 1] * shifts[1:, 0])
    return "circle clockwise" if turning > 0 else "circle anticlockwise"


def test_motion_tells_the_class(scenes):
    told = [
        (action.label, told_by_motion(scene, action.start_seconds, action.end_seconds))
        for scene in scenes[:15]
        for action in scene.record.actions
    ]
    assert np.mean([label == guess for label, guess in told]) > 0.9
    assert {label for label, _ in told} == set(CLASSES)


def test_no_single_frame_tells_the_class(scenes):
    """Nearest class mean over small pictures, the simplest use of position, colour and size, is near chance, 1/6."""
    pictures, labels = [], []
    for scene in scenes:
        for action in scene.record.actions:
            (frame,) = frames_at(scene, np.array([(action.start_seconds + action.end_seconds) / 2]))
            rows, columns = (np.linspace(0, side - 1, 16).astype(int) for side in frame.shape[:2])
            small = frame[rows][:, columns].astype(float)
            pictures.append(abs(small - np.median(small, axis=(0, 1))).ravel())
            labels.append(list(CLASSES).index(action.label))
    pictures, labels = np.array(pictures), np.array(labels)
    half = len(labels) // 2
    means = np.stack([pictures[:half][labels[:half] == number].mean(0) for number in range(len(CLASSES))])
    guesses = ((pictures[half:, None] - means) ** 2).sum(-1).argmin(1)
    assert (guesses == labels[half:]).mean() < 0.3


def test_places_do_not_tell_the_class(scenes):
    """On the torus the places of an object in its action spread evenly, in each class: mean direction near zero."""
    places: dict[str, list[np.ndarray]] = {label: [] for label in CLASSES}
    for scene in scenes:
        size = np.array(scene.background.shape[1::-1])
        for action in scene.record.actions:
            frame = int((action.start_seconds + action.end_seconds) / 2 * scene.rate)
            (actor,) = [
                a
                for a in scene.actors
                if len(a.centres) < len(scene.shifts) and a.first <= frame < a.first + len(a.centres)
            ]
            places[action.label].append(actor.centres[frame - actor.first] / 4 / size)
    for centres in places.values():
        directions = np.exp(2j * np.pi * np.array(centres)).mean(0)
        assert abs(directions).max() < 3 / np.sqrt(len(centres))


def test_objects_stand_still_outside_their_actions_and_some_never_act(scenes):
    decoys = lingering = 0
    for scene in scenes:
        seconds = np.arange(len(scene.shifts)) / float(scene.rate)
        for actor in (actor for actor in scene.actors if len(actor.centres) < len(seconds)):
            moving = np.flatnonzero((np.diff(actor.centres, axis=0) != 0).any(1)) + actor.first
            seen = seconds[actor.first : actor.first + len(actor.centres)]
            actions = [a for a in scene.record.actions if seen[0] < a.end_seconds and a.start_seconds < seen[-1]]
            if not len(moving):
                decoys += 1
                assert actions == []
                continue
            (action,) = actions
            assert action.start_seconds - 0.1 < seconds[moving[0]]
            assert seconds[moving[-1]] < action.end_seconds + 0.1
            lingering += seen[-1] > action.end_seconds + 0.2
    assert decoys > 5
    assert lingering > 20


def test_something_moves_all_the_time(scenes):
    for scene in scenes[:10]:
        dots = [actor for actor in scene.actors if len(actor.centres) == len(scene.shifts)]
        assert len(dots) >= NUM_DOTS[0] > 0
        speeds = np.mean([np.abs(np.diff(dot.centres[:: int(scene.rate) // 4], axis=0)).sum(1) for dot in dots], axis=0)
        assert speeds.min() > 0


def test_files_are_ordinary_web_video(folder):
    entries = json.loads((folder / "annotations.json").read_text())["database"]
    for video_id, entry in entries.items():
        with av.open(str(folder / "videos" / f"{video_id}.mp4")) as container:
            stream = container.streams.video[0]
            frames = list(container.decode(stream))
            assert stream.codec_context.name == "h264"
            assert stream.average_rate in RATES
            assert (stream.width, stream.height) in SIZES
            assert entry["resolution"] == f"{stream.width}x{stream.height}"
            assert entry["duration"] == pytest.approx(len(frames) / stream.average_rate)
        kinds = Counter(frame.pict_type for frame in frames)
        assert kinds[av.video.frame.PictureType.B] > len(frames) / 5
        assert sum(frame.key_frame for frame in frames) == -(-len(frames) // 250)


def test_the_files_show_what_was_drawn(folder):
    scene = draw_scene(subset="validation", number=1, seed=5)
    with av.open(str(folder / "videos" / "demo_validation_0001.mp4")) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number % 40 == 0:
                difference = frame.to_ndarray(format="rgb24").astype(float) - scene.frame(number)
                assert abs(difference).mean() < 6


def test_annotations_are_sound_and_say_what_was_drawn(folder):
    annotations = read_annotations(folder / "annotations.json")
    assert set(annotations.classes) <= set(CLASSES)
    assert {name: len(records) for name, records in annotations.subsets.items()} == {"training": 2, "validation": 2}
    for record in (record for records in annotations.subsets.values() for record in records):
        number = int(record.video_id[-4:])
        assert record == draw_scene(subset=record.subset, number=number, seed=5).record
        assert record.actions
        for action in record.actions:
            assert action.end_seconds - action.start_seconds + 0.02 >= 1.5
            assert action.end_seconds <= record.duration_seconds
    raw = json.loads((folder / "annotations.json").read_text())
    assert {node["nodeName"] for node in raw["taxonomy"]} == {"Root", *CLASSES}


def test_the_same_seed_gives_the_same_bytes_for_any_number_of_workers(folder, tmp_path):
    write_demo(tmp_path, SMALL, workers=1)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_another_seed_gives_other_videos():
    one, other = (draw_scene(subset="training", number=0, seed=seed) for seed in (0, 1))
    assert one.record != other.record
    assert not np.array_equal(one.frame(0), other.frame(0))


def test_a_second_run_finds_the_work_done_and_another_config_is_refused(folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    demo(out=folder, seed=5, num_training=2, num_validation=2)
    assert "2 training and 2 validation videos" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(ValueError, match=r"annotations\.json is not of .*seed=6.* choose another folder"):
        demo(out=folder, seed=6, num_training=2, num_validation=2)


@pytest.mark.parametrize("change", [{"num_training": 0}, {"num_validation": 0}, {"seed": -1}])
def test_settings_without_a_meaning_are_refused(change):
    (name, value), *_ = change.items()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        DemoConfig(**change)


def test_rates_and_sizes_are_mixed(scenes):
    assert {scene.rate for scene in scenes} == set(RATES)
    sizes = {scene.background.shape[1::-1] for scene in scenes}
    assert len(sizes) >= 6
    assert sizes <= set(SIZES)
    assert Fraction(30000, 1001) in RATES


def test_motion_tells_the_class_of_a_trimmed_clip_from_its_first_frame_to_its_last():
    clips = [draw_clip(subset="training", number=number, seed=0) for number in range(24)]
    records = [clip.record for clip in clips]
    assert all(record.actions[0].start_seconds == 0 for record in records)
    assert all(record.actions[0].end_seconds == record.duration_seconds for record in records)
    assert all(CLIP_SECONDS[0] - 0.05 < record.duration_seconds <= CLIP_SECONDS[1] for record in records)
    assert Counter(record.actions[0].label for record in records) == dict.fromkeys(CLASSES, 4)
    told = [told_by_motion(clip, 0.0, clip.record.duration_seconds) for clip in clips]
    right = sum(label == record.actions[0].label for label, record in zip(told, records, strict=True))
    assert right >= 23


def test_trimmed_clips_lie_in_folders_of_their_classes(tmp_path):
    listing = write_demo_clips(tmp_path, SMALL, workers=1)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.mp4"))
    assert files == [
        "clips/training/slide left/demo_clip_training_0000.mp4",
        "clips/training/slide right/demo_clip_training_0001.mp4",
        "clips/validation/slide left/demo_clip_validation_0000.mp4",
        "clips/validation/slide right/demo_clip_validation_0001.mp4",
    ]
    assert write_demo_clips(tmp_path, SMALL) == listing
    with pytest.raises(ValueError, match=r"clips.json is not of .*seed=6"):
        write_demo_clips(tmp_path, DemoConfig(num_training=2, num_validation=2, seed=6))


def test_two_that_draw_into_one_folder_at_once_are_refused(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="is in use by a run on host"):
        demo(out=tmp_path, num_training=1, num_validation=1, workers=1)


def test_what_ctrl_c_means_is_decided_by_one_process():
    """The others ended in a traceback each, on the terminal."""
    assert _in_processes(interrupted, SMALL, workers=1) == [0, 1, 0, 1]


def test_a_worker_that_is_killed_is_said_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("re2tal.data.building.demo.ProcessPoolExecutor", Mock(side_effect=BrokenProcessPool))
    with pytest.raises(ChildProcessError, match=r"was killed, most often for lack of memory; .* fewer --workers"):
        write_demo(tmp_path, SMALL, workers=1)
