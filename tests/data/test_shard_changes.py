"""Other annotations for shards that are there, and shards joined: pixels stay, labels are those of the file."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from data.feature_folders import write_features
from data.folders import indexed, write_shards
from data.numbered import encode_numbered, read_numbers

from re2tal.cli import main
from re2tal.data.building import annotate
from re2tal.data.contract.commit import commit
from re2tal.data.contract.members import read_video
from re2tal.data.contract.shards import open_any, open_shards
from re2tal.data.contract.verify import damage
from re2tal.data.streaming.decode import decode_frames
from re2tal.runs.lock import locked
from re2tal.runs.shard_building import shards_locked
from re2tal.runs.shard_changes import merge
from re2tal.structures import Action

SECONDS = 2.0


def run(capsys, *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["shards", *map(str, arguments)])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


encoded = cache(encode_numbered)
"""The same bytes each time, which the encoder does not promise."""


def folder_of(root: Path, *video_ids: str, subset: str = "training", first: int = 60) -> Path:
    """Shards of two videos each; the n-th has `first` + n frames, and the action x."""
    actions = [Action(0.5, 1.0, "x")]
    videos = {
        name: (encoded(first + n), indexed(first + n, actions=actions, video_id=name))
        for n, name in enumerate(video_ids)
    }
    write_shards(root / subset, videos, per_shard=2)
    if subset != "training":
        change(root / subset, subset)
    return root


def change(folder: Path, subset: str) -> None:
    """Give a folder of the tests another subset's name."""
    shards = open_shards(folder)
    entries = [replace(v, record=replace(v.record, subset=subset)) for v in shards.videos]
    commit(folder, entries, lambda sha256: replace(shards.manifest, subset=subset, index_sha256=sha256))


def annotations(path: Path, **videos: tuple[str, float, list[tuple[float, float, str]]]) -> Path:
    """A file of id=(subset, seconds, actions)."""
    database = {
        name: {
            "subset": subset,
            "duration": seconds,
            "annotations": [{"segment": [start, end], "label": label} for start, end, label in actions],
        }
        for name, (subset, seconds, actions) in videos.items()
    }
    path.write_text(json.dumps({"database": database}))
    return path


def tars(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.tar"))}


def labels(root: Path) -> dict[str, list[str]]:
    return {name: [a.label for a in video.record.actions] for name, video in open_shards(root).by_id.items()}


def last_frame(root: Path, video_id: str) -> int:
    shards = open_shards(root)
    video = shards.by_id[video_id]
    mp4 = read_video(shards, video)
    return read_numbers(decode_frames(*mp4.cut([video.num_frames - 1])).numpy())[0]


def test_annotating_changes_the_index_and_no_tar(tmp_path, capsys):
    root = folder_of(tmp_path / "s", "a", "b", "c")
    before, old = tars(root), open_shards(root / "training").manifest_sha256
    one = ("training", SECONDS, [(0.25, 0.75, "y"), (1.0, 1.5, "x")])
    given = annotations(tmp_path / "a.json", a=one, b=("training", 2.5, []), c=("training", 9.0, []), new=one)
    status, out, err = run(capsys, "annotate", root, given)
    shards = open_shards(root / "training")
    assert (tars(root), status) == (before, 3)
    assert (labels(shards.root), shards.classes) == ({"a": ["y", "x"], "b": []}, ("x", "y"))
    assert shards.by_id["b"].record.duration_seconds == 2.5
    assert {one.video_id: one.reason for one in shards.manifest.rejected} == {
        "c": "it lasts 2.07 s, the annotation file says 9.00 s",
        "new": "its pictures are in none of these shards; add them with `re2tal shards build`",
    }
    assert shards.manifest_sha256 != old, "a run that resumes compares it"
    assert "training: 2 of 2 videos have other annotations" in out
    assert "rejected c: it lasts" in err
    assert list(damage(shards)) == []
    everything = dict.fromkeys("abc", one)
    assert run(capsys, "annotate", root / "training", annotations(given, **everything))[0] == 0
    assert labels(root / "training") == {name: ["y", "x"] for name in "abc"}
    assert tars(root) == before


def test_a_video_that_changes_its_subset_is_copied_as_it_is(tmp_path, capsys):
    root = folder_of(tmp_path / "s", "a", "b", "c")
    folder_of(root, "d", "e", subset="validation", first=80)
    act = [(0.25, 0.75, "x")]
    given = annotations(
        tmp_path / "a.json",
        a=("val", SECONDS, act),
        b=("training", SECONDS, act),
        c=("test", 62 / 30, act),
        d=("validation", 80 / 30, act),
        e=("train", 81 / 30, act),
    )
    status, out, _ = run(capsys, "annotate", root, given)
    assert status == 0
    found = {subset: [*labels(root / subset)] for subset in ("training", "validation", "test")}
    assert found == {"training": ["b", "e"], "validation": ["d", "a"], "test": ["c"]}
    for subset, video_id, number in (("validation", "a", 59), ("test", "c", 61), ("training", "e", 80)):
        assert last_frame(root / subset, video_id) == number
    assert all(list(damage(open_shards(root / subset))) == [] for subset in found)
    assert "validation: 1 of 2 videos have other annotations, 1 came from another subset, 0 are listed no" in out
    status, _, err = run(capsys, "annotate", root / "training", given)
    assert (status, err) == (0, "")
    given = annotations(given, b=("test", SECONDS, act), e=("train", 81 / 30, act))
    status, _, err = run(capsys, "annotate", root / "training", given)
    assert (status, "holds 'b', which belongs to subset 'test' now; give the folder of all" in err) == (2, True)


def test_annotations_of_other_videos_change_nothing(tmp_path, capsys):
    root = folder_of(tmp_path / "s", "a", "b")
    before = {path: path.read_bytes() for path in root.rglob("*.*") if path.is_file()}
    other = annotations(tmp_path / "a.json", z=("training", SECONDS, [(0, 1, "x")]))
    status, _, err = run(capsys, "annotate", root, other)
    assert (status, "no video of subset 'training' would be left" in err) == (2, True)
    assert before == {path: path.read_bytes() for path in root.rglob("*.*") if path.is_file()}


def test_an_id_that_stands_for_two_videos_is_left_out_and_named_each_time(tmp_path, capsys):
    root = folder_of(tmp_path / "s", "a", "b")
    folder_of(tmp_path / "s", "b", "c", subset="validation", first=70)
    before = tars(root / "training"), tars(root / "validation")
    new = annotations(
        tmp_path / "new.json",
        a=("training", SECONDS, [(0.1, 0.4, "x")]),
        b=("training", SECONDS, [(0.1, 0.4, "x")]),
        c=("validation", 71 / 30, [(0.1, 0.4, "x")]),
    )
    for _ in range(2):  # those that are not listed any more are not taken for known either
        code, out, err = run(capsys, "annotate", root, new, "--max-rejected", 0.5)
        assert code == 0
        assert f"rejected b: other pictures have its name in {root / 'training'} and in {root / 'validation'}" in err
        assert "training: 1 of 1 videos" in out or "training: 0 of 1 videos" in out
        assert [sorted(labels(root / name)) for name in ("training", "validation")] == [["a"], ["c"]]
    assert (tars(root / "training"), tars(root / "validation")) == before


def test_an_id_in_another_unicode_form_is_the_same_video(tmp_path, capsys):
    root = folder_of(tmp_path / "1", "caf\u00e9", "b")
    given = annotations(tmp_path / "a.json", **{"cafe\u0301": ("training", SECONDS, [(0.5, 1.0, "y")])})
    assert run(capsys, "annotate", root, given)[0] == 0
    assert labels(root / "training") == {"caf\u00e9": ["y"]}
    assert list(damage(open_shards(root / "training"))) == []


def test_two_do_not_annotate_one_folder_at_once(tmp_path, capsys):
    root = folder_of(tmp_path / "1", "a")
    given = annotations(tmp_path / "a.json", a=("training", SECONDS, [(0.5, 1.0, "y")]))
    with locked(root / "training"):
        status, _, err = run(capsys, "annotate", root, given)
    assert (status, f"{root}/training is in use by" in err, labels(root / "training")) == (2, True, {"a": ["x"]})
    assert run(capsys, "annotate", root, given)[0] == 0
    assert labels(root / "training") == {"a": ["y"]}
    assert not (root / "training" / "lock").exists()


def test_a_swap_of_subsets_that_was_broken_off_is_completed(tmp_path, capsys, monkeypatch):
    root = folder_of(folder_of(tmp_path / "1", "a", "b"), "c", "d", subset="validation", first=90)
    kind = {"a": "validation", "b": "training", "c": "training", "d": "validation"}
    seconds = {"a": 2.0, "b": 61 / 30, "c": 3.0, "d": 91 / 30}
    given = annotations(tmp_path / "a.json", **{k: (kind[k], seconds[k], [(0.5, 1.0, "x")]) for k in kind})
    write = annotate._write
    written = []

    def once(change, classes):
        if written:
            raise KeyboardInterrupt
        written.append(change.subset)
        write(change, classes)

    monkeypatch.setattr(annotate, "_write", once)
    assert run(capsys, "annotate", root, given)[0] == 130
    monkeypatch.undo()
    for _ in range(2):
        assert run(capsys, "annotate", root, given)[0] == 0
        for subset, wanted in (("training", {"b": 60, "c": 89}), ("validation", {"a": 59, "d": 90})):
            assert {name: last_frame(root / subset, name) for name in labels(root / subset)} == wanted
            assert list(damage(open_shards(root / subset))) == []


def test_merged_folders_hold_all_videos_with_their_labels(tmp_path, capsys):
    first, second = folder_of(tmp_path / "1", "a", "b", "c"), folder_of(tmp_path / "2", "d", first=90)
    given = annotations(tmp_path / "a.json", d=("training", 3.0, [(0.5, 1.0, "y")]))
    run(capsys, "annotate", second, given)
    status, out, _ = run(capsys, "merge", first, second / "training", "--out", tmp_path / "out")
    merged = open_shards(tmp_path / "out" / "training")
    assert status == 0
    assert labels(merged.root) == {"a": ["x"], "b": ["x"], "c": ["x"], "d": ["y"]}
    assert merged.classes == ("x", "y")
    assert [shard.name for shard in merged.manifest.shards] == [f"shard-{n:06d}.tar" for n in range(3)]
    assert os.path.samefile(merged.root / "shard-000002.tar", second / "training" / "shard-000000.tar")
    assert (last_frame(merged.root, "c"), last_frame(merged.root, "d")) == (61, 89)
    assert list(damage(merged)) == []
    assert "4 videos" in out


def test_of_videos_that_two_folders_have_equal_ones_are_taken_once_and_others_left_out(tmp_path, capsys):
    first = folder_of(tmp_path / "1", "a", "b", "same")
    second = folder_of(tmp_path / "2", "x", "c", "same", "b")
    status, _, err = run(capsys, "merge", first, second, "--out", tmp_path / "out")
    assert status == 0
    assert [*labels(tmp_path / "out" / "training")] == ["a", "same", "x", "c"]
    both = f"it is in {first}/training and in {second}/training, and differs; leave it out of one with"
    assert err.count(f"rejected b: {both}") == 1
    assert f"not taken again: 'same' of {second}/training" in err
    merged = open_shards(tmp_path / "out" / "training")
    assert list(damage(merged)) == []
    accents = [folder_of(tmp_path / name, "z", video_id) for name, video_id in (("c", "\u00e9"), ("d", "e\u0301"))]
    run(capsys, "merge", *accents, "--out", tmp_path / "accents")
    assert [*labels(tmp_path / "accents" / "training")] == ["z"]
    with pytest.raises(ValueError, match="none of the 1 videos can be used; the first, b: it is in "):
        merge([folder_of(tmp_path / "e", "b"), folder_of(tmp_path / "f", "b", first=90)], out=tmp_path / "g")


def test_a_folder_is_merged_once_and_damaged_videos_are_left_out(tmp_path, capsys):
    first = folder_of(tmp_path / "1", "a", "b")
    status, _, err = run(capsys, "merge", first, tmp_path / "." / "1" / ".." / "1", "--out", tmp_path / "out")
    assert (status, "is given twice" in err, (tmp_path / "out").exists()) == (2, True, False)
    third = folder_of(tmp_path / "3", "d", "e")
    video = open_shards(third / "training").by_id["d"]
    tar = third / "training" / video.shard
    content = bytearray(tar.read_bytes())
    content[video.offset + 3000] ^= 1
    tar.write_bytes(content)
    status, _, err = run(capsys, "merge", first, third, "--out", tmp_path / "out")
    assert (status, "rejected d: shard-000000.tar: crc32" in err) == (0, True)
    assert f"'e' of {third}/training has the bytes of 'b' of {first}/training" in err
    assert [*labels(tmp_path / "out" / "training")] == ["a", "b", "e"]
    status, _, err = run(capsys, "merge", first, third, "--out", tmp_path / "out")
    assert (status, "holds shards already; give another --out" in err) == (2, True)


def test_features_get_other_annotations_too_but_not_another_length(tmp_path, capsys):
    made = write_features(
        tmp_path / "training", {"a": torch.zeros(4, 8), "b": torch.ones(4, 8)}, actions=[Action(0.5, 1.0, "x")]
    )
    seconds = {name: entry.record.duration_seconds for name, entry in made.by_id.items()}
    act = [(0.25, 0.5, "y")]
    given = annotations(tmp_path / "a.json", a=("training", seconds["a"], act), b=("training", seconds["b"] + 9, act))
    before = tars(tmp_path)
    status, _, err = run(capsys, "annotate", tmp_path, given)
    found = open_any(tmp_path / "training")
    assert (status, "rejected b: it lasts" in err, tars(tmp_path)) == (3, True, before)
    assert {name: [one.label for one in entry.record.actions] for name, entry in found.by_id.items()} == {"a": ["y"]}
    assert list(damage(found)) == []


def test_an_entry_without_a_duration_is_measured_in_the_shards_or_left_out_alone(tmp_path, capsys):
    shards = folder_of(tmp_path / "1", "a", "b")
    entry = {"subset": "training", "duration": 0, "annotations": [{"segment": [0.5, 1.0], "label": "y"}]}
    (tmp_path / "a.json").write_text(json.dumps({"database": {"a": entry, "b.mp4": entry, "gone": entry}}))
    status, _, err = run(capsys, "annotate", shards, tmp_path / "a.json")
    assert status == 3
    assert "rejected gone: its pictures are in none of these shards" in err
    assert labels(shards / "training") == {"a": ["y"], "b": ["y"]}
    assert open_shards(shards / "training").by_id["a"].record.duration_seconds == 2.0


def test_what_was_measured_is_measured_again_without_a_change_and_also_where_it_was_not_listed(tmp_path, capsys):
    shards = folder_of(tmp_path / "1", "a", "b")
    seconds = 2.0 + 0.4 / 30  # as a build measures the source
    run(capsys, "annotate", shards, annotations(tmp_path / "a.json", a=("training", seconds, [(0.5, 1.0, "y")])))
    entry = {"subset": "training", "annotations": [{"segment": [0.5, 1.0], "label": "y"}]}
    (tmp_path / "b.json").write_text(json.dumps({"database": {"a": entry, "b": entry}}))
    status, out, _ = run(capsys, "annotate", shards, tmp_path / "b.json")
    assert (status, "1 of 2 videos have other annotations" in out) == (0, True)  # b, which was not listed
    assert open_shards(shards / "training").by_id["a"].record.duration_seconds == seconds


@pytest.mark.parametrize(
    ("first", "second", "are_apart"),
    [
        ({}, {"part_index": 0, "num_parts": 2}, False),
        ({"part_index": 0, "num_parts": 2}, {}, False),
        ({"part_index": 0, "num_parts": 2}, {"part_index": 1, "num_parts": 3}, False),
        ({"part_index": 1, "num_parts": 2}, {"part_index": 1, "num_parts": 2}, False),
        ({"part_index": 0, "num_parts": 2}, {"part_index": 1, "num_parts": 2}, True),
        ({"part_index": 1, "num_parts": 12}, {"part_index": 1, "num_parts": 2}, False),
    ],
)
def test_only_parts_of_one_number_of_parts_work_in_a_folder_at_once(tmp_path, first, second, are_apart):
    with shards_locked(tmp_path, **first), nullcontext() if are_apart else pytest.raises(ValueError, match="in use by"):
        with shards_locked(tmp_path, **second):
            pass
    with shards_locked(tmp_path, **second):  # nobody is left
        pass
    assert list(tmp_path.rglob("lock")) == []
