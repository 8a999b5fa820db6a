"""Corrections: what is saved is what the reader of annotations takes, and two people lose nothing."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from re2tal.data.building.annotations import read_annotations
from re2tal.structures import Action, VideoRecord
from re2tal.viewer.annotation_file import AnnotationFile, Conflict, Edit, merge_actions

A, B, C = Action(0.0, 1.0, "jump"), Action(2.0, 3.0, "run"), Action(4.0, 5.0, "run")


def entry(*actions: Action, **more: Any) -> dict[str, Any]:
    rows = [{"segment": [one.start_seconds, one.end_seconds], "label": one.label, "by": "me"} for one in actions]
    return {"subset": "training", "duration": 10, **more, "annotations": rows}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"version": 7, "database": {"v": entry(A, B, url="u"), "w": entry(C)}}))
    return path


def opened(source: Path) -> AnnotationFile:
    return AnnotationFile(source.with_name("corrected.json"), source=source, subset="training")


def edit(key: str, base: tuple[Action, ...], actions: tuple[Action, ...]) -> Edit:
    return Edit(key, 10.0, base, actions)


def test_a_correction_is_read_back_and_the_rest_of_the_file_stays(source: Path) -> None:
    file, before = opened(source), source.read_bytes()
    moved = Action(2.5, 3.25, "run")
    state = file.save([edit("v", (A, B), (A, moved))], revision=file.state().revision)
    assert state.actions("v") == (A, moved)
    (v, w) = read_annotations(file.save_to).subset("training")
    assert (v.actions, w.actions) == ((A, moved), (C,))
    saved = json.loads(file.save_to.read_text())
    assert saved["version"] == 7
    assert saved["database"]["v"]["url"] == "u"
    assert [row.get("by") for row in saved["database"]["v"]["annotations"]] == ["me", None]
    assert source.read_bytes() == before
    assert {path.name for path in source.parent.iterdir()} == {"annotations.json", "corrected.json"}


def test_a_new_video_gets_an_entry_that_can_be_trained_on(tmp_path: Path) -> None:
    file = AnnotationFile(tmp_path / "new" / "corrected.json", subset="validation")
    file.save([edit('odd "id"', (), (A,))], revision=file.state().revision)
    (record,) = read_annotations(file.save_to).subset("validation")
    assert (record.video_id, record.duration_seconds, record.actions) == ('odd "id"', 10.0, (A,))


def test_it_goes_on_from_what_was_saved_before(source: Path) -> None:
    first = opened(source)
    first.save([edit("v", (A, B), (A,))], revision=first.state().revision)
    assert opened(source).state().actions("v") == (A,)


def test_records_of_shards_stand_in_for_a_file(tmp_path: Path) -> None:
    file = AnnotationFile(tmp_path / "c.json", records=[VideoRecord("v", "validation", 10.0, (A,))], subset="training")
    file.save([edit("v", (A,), (A, B))], revision=file.state().revision)
    assert read_annotations(file.save_to).subset("validation")[0].actions == (A, B)


def test_two_viewers_of_one_file_lose_no_edit(source: Path) -> None:
    one, two = opened(source), opened(source)
    revision = two.state().revision
    one.save([edit("v", (A, B), (A, B, C))], revision=one.state().revision)
    mine = edit("v", (A, B), (B, Action(6.0, 7.0, "run")))
    with pytest.raises(Conflict, match="was saved by another program") as caught:
        two.save([mine], revision=revision)
    assert caught.value.both == ["v"]
    state = two.save([mine], revision=caught.value.revision, merge=True)
    assert set(state.actions("v")) == {B, C, Action(6.0, 7.0, "run")}


def test_without_merge_a_video_that_both_changed_is_a_conflict_whatever_the_revision(source: Path) -> None:
    file = opened(source)
    with pytest.raises(Conflict):
        file.save([edit("v", (A,), (A, C))], revision=file.state().revision)
    assert not file.save_to.exists()


def test_a_change_on_the_disk_is_noticed(source: Path) -> None:
    file = opened(source)
    before = file.state()
    document = json.loads(source.read_text())
    document["database"]["w"]["annotations"] = []
    source.write_text(json.dumps(document))
    assert file.state().revision != before.revision
    assert file.state().actions("w") == ()
    with pytest.raises(Conflict):
        file.save([edit("v", (A, B), (A,))], revision=before.revision)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (Action(3.0, 3.0, "run"), "starts before it ends"),
        (Action(-1.0, 3.0, "run"), "starts before it ends"),
        (Action(9.0, 10.5, "run"), "within the 10 s"),
        (Action(float("nan"), 3.0, "run"), "starts before it ends"),
        (Action(1.0, 2.0, " "), "class name of 1 to 200"),
        (Action(1.0, 2.0, "Run"), "spelled 'run' elsewhere"),
    ],
)
def test_what_no_reader_would_take_is_refused(source: Path, action: Action, message: str) -> None:
    file = opened(source)
    with pytest.raises(ValueError, match=message):
        file.save([edit("v", (A, B), (A, B, action))], revision=file.state().revision)
    assert not file.save_to.exists()


def test_a_save_that_fails_leaves_the_old_file(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = opened(source)
    file.save([edit("v", (A, B), (A,))], revision=file.state().revision)
    before = file.save_to.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        file.save([edit("v", (A,), ())], revision=file.state().revision)
    assert file.save_to.read_bytes() == before
    assert len(list(source.parent.iterdir())) == 2


def test_annotations_that_are_no_annotations_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"database": {"v": {"annotations": [{"segment": [1], "label": "x"}]}}}')
    file = AnnotationFile(tmp_path / "b.json", source=path, subset="training")
    with pytest.raises(ValueError, match=r"a.json: database\['v'\].annotations\[0\] is"):
        file.state().actions("v", path)
    path.write_text("[]")
    with pytest.raises(ValueError, match='needs an object "database"'):
        file.state()


def test_merging_by_hand() -> None:
    assert merge_actions((A, B), (A, B), (B, C)) == (B, C)
    assert merge_actions((A, B), (B,), (A, B, C)) == (B, C)  # they removed A, I added C
    assert merge_actions((A,), (A, A), (A, B)) == (A, B, A)  # a second equal one is another action
    assert merge_actions((A,), (A, B), (A, B)) == (A, B)  # both added the same
    assert merge_actions((A, A), (A,), (A,)) == (A,)  # both removed the same
    assert merge_actions((A,), (), (A, A)) == (A,)  # they removed one, I added one
    assert merge_actions((A,), (B,), (C,)) == (C, B)  # both moved it: both results stay


def test_merging_loses_no_addition_and_revives_no_removal() -> None:
    chance = random.Random(5)
    every = [Action(float(n), n + 1.0, "x") for n in range(8)]
    for _ in range(200):
        base, theirs, mine = (tuple(chance.sample(every, chance.randint(0, 8))) for _ in range(3))
        merged = set(merge_actions(base, theirs, mine))
        assert merged == (set(base) & set(theirs) & set(mine)) | (set(theirs) - set(base)) | (set(mine) - set(base))
