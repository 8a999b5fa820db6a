"""What a score says about videos and labels that only the predictions, or only the ground truth, have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import re2tal
from re2tal.runs.evaluation import ScoringOptions
from re2tal.video_ids import match_ids


def write(folder: Path, found: dict[str, list], truth: dict[str, list]) -> tuple[Path, Path]:
    """Predictions and annotations; a segment is (start, end, label)."""
    results = {
        name: [{"segment": [start, end], "label": label, "score": 0.5} for start, end, label in rows]
        for name, rows in found.items()
    }
    database = {
        name: {
            "subset": "validation",
            "duration": 9.0,
            "annotations": [{"segment": [start, end], "label": label} for start, end, label in rows],
        }
        for name, rows in truth.items()
    }
    predictions, annotations = folder / "found.json", folder / "truth.json"
    predictions.write_text(json.dumps({"results": results}))
    annotations.write_text(json.dumps({"database": database}))
    return predictions, annotations


JUMP = [(1.0, 4.0, "jump")]


def test_what_does_not_meet_is_counted_and_named_beside_the_number(tmp_path: Path) -> None:
    found = {"a": [*JUMP, (5.0, 6.0, "Jump "), (6.0, 5.0, "jump")], "b": [], "stranger": JUMP}
    scored = re2tal.evaluate(*write(tmp_path, found, {"a": JUMP, "b": JUMP, "c": JUMP, "empty": []}))
    assert scored.average_map == pytest.approx(1 / 3)
    coverage = scored.to_json()["coverage"]
    assert coverage["videos_without_predictions"] == ("b", "c")
    assert coverage["unknown_videos"] == {"stranger": 1}
    assert coverage["unknown_labels"] == {"Jump ": 1}
    assert coverage["reversed_segments"] == {"a": 1}
    lines = str(scored).splitlines()
    assert lines[1] == "subset validation: 4 videos, 1 without true actions; no blocked list; by class"
    assert lines[2:6] == [
        "note: 2 of 3 videos with true actions have no predictions: 'b', 'c'",
        "note: 1 predicted videos are not in the subset (their 1 predictions count as false): 'stranger'",
        "note: 1 predicted labels have no true action in the subset (their 1 predictions count nowhere): 'Jump ', "
        "which is nearly 'jump'",
        "note: 1 predictions end before they start, and count as false, or by protocol official as right if as long "
        "as a true action: 'a'",
    ]


def test_true_actions_that_do_not_count_are_told_and_classes_that_vanish_with_them(tmp_path: Path) -> None:
    """The only action of a class has its times the wrong way round: the class was gone from the mAP without a word."""
    files = write(tmp_path, {"a": JUMP}, {"a": [*JUMP, *JUMP, (6.0, 5.0, "run")], "b": [(2.0, 2.0, "jump")]})
    scored = re2tal.evaluate(*files)
    assert scored.average_map == 1
    assert (
        "note: 3 true actions are left out under this protocol, and with them the classes 'run': they end where they "
        "start or before, or repeat another" in str(scored)
    )
    assert "left out under" not in str(re2tal.evaluate(*files, ScoringOptions(protocol="official")))


def test_a_label_in_another_unicode_form_is_shown_to_be_in_one(tmp_path: Path) -> None:
    found = {"a": [*JUMP, (1.0, 4.0, "u\u0308ben")]}
    scored = re2tal.evaluate(*write(tmp_path, found, {"a": [*JUMP, (1.0, 4.0, "\u00fcben")]}))
    assert r"'u\u0308ben', which is nearly '\xfcben'" in str(scored)


def test_a_sound_file_has_no_notes(tmp_path: Path) -> None:
    scored = re2tal.evaluate(*write(tmp_path, {"a": JUMP}, {"a": JUMP}))
    assert scored.to_json()["coverage"]["notes"] == []


def test_classes_of_the_truth_that_are_nearly_the_same_are_named(tmp_path: Path) -> None:
    truth = {"a": [*JUMP, (5.0, 6.0, "Jump ")]}
    scored = re2tal.evaluate(*write(tmp_path, {"a": JUMP}, truth))
    assert "note: labels that are nearly the same are scored as different classes: 'jump', 'Jump '" in str(scored)


@pytest.mark.parametrize("ids", [("a", "a.mp4"), ("a.MKV", "a"), ("v_a", "a"), ("a", "v_a.mp4")])
def test_ids_match_without_suffix_and_prefix(tmp_path: Path, ids: tuple[str, str]) -> None:
    ours, theirs = ids
    scored = re2tal.evaluate(*write(tmp_path, {ours: JUMP}, {theirs: JUMP, "other": JUMP}))
    assert scored.average_map == 0.5
    assert scored.to_json()["coverage"]["renamed_videos"] == {ours: theirs}
    assert f"note: 1 videos matched without suffix or prefix: {ours!r} is {theirs!r}" in str(scored)


def test_ids_that_are_ambiguous_or_known_as_they_stand_are_left_alone() -> None:
    assert match_ids(["a.mp4"], ["a", "v_a"]) == {}
    assert match_ids(["a.mp4", "a.mkv"], ["a"]) == {}
    assert match_ids(["a", "a.mp4"], ["a"]) == {}
    assert match_ids(["v_a"], ["v_a", "a"]) == {}
    assert match_ids(["v2"], ["v_2"]) == {}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            {"x": JUMP},
            r"found.json and .*truth.json do not match: no predicted video is among the 1 .*predicted are 'x'",
        ),
        ({}, "no predicted video is among the 1 of subset 'validation': predicted are none"),
        ({"x": JUMP, "a": []}, "no predicted video is among the 1"),
        ({"a": [(1.0, 4.0, "hop")]}, "no predicted label has a true action .*predicted are 'hop', and there 'jump'"),
    ],
)
def test_where_nothing_meets_there_is_no_number(tmp_path: Path, found: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        re2tal.evaluate(*write(tmp_path, found, {"a": JUMP}))


def test_a_detector_that_finds_nothing_scores_zero(tmp_path: Path) -> None:
    scored = re2tal.evaluate(*write(tmp_path, {"a": []}, {"a": JUMP}))
    assert scored.average_map == 0
    assert "note: 1 of 1 videos with true actions have no predictions: 'a'" in str(scored)


def test_the_blocked_list_is_named_and_matched_like_other_ids(tmp_path: Path) -> None:
    files = write(tmp_path, {"v_a": JUMP, "b": []}, {"a": JUMP, "b": JUMP})
    blocked = tmp_path / "blocked.json"
    blocked.write_text(json.dumps(["v_b.mp4", "elsewhere"]))
    scored = re2tal.evaluate(*files, re2tal.ScoringOptions(blocked_videos=blocked, class_agnostic=True))
    assert scored.average_map == 1
    assert str(scored).splitlines()[1] == (
        "subset validation: 1 videos; 1 of the 2 videos on the blocked list left out; class-agnostic"
    )
    blocked.write_text(json.dumps(["elsewhere"]))
    assert "note: none of the 1 blocked ids is in the subset" in str(
        re2tal.evaluate(*files, re2tal.ScoringOptions(blocked_videos=blocked))
    )


def test_what_the_limit_cut_is_counted_and_a_common_number_looks_like_one(tmp_path: Path) -> None:
    many = [(1.0, 4.0 + shift / 100, "jump") for shift in range(20)]
    predictions, annotations = write(tmp_path, {"a": many, "b": many}, {"a": JUMP, "b": JUMP})
    assert "2 videos have exactly 20 predictions, the most of any" in str(re2tal.evaluate(predictions, annotations))
    document = json.loads(predictions.read_text())
    predictions.write_text(json.dumps(document | {"num_cut": {}}))
    assert "limit" not in str(re2tal.evaluate(predictions, annotations))
    predictions.write_text(json.dumps(document | {"num_cut": {"b": 7}}))
    scored = re2tal.evaluate(predictions, annotations)
    assert scored.to_json()["coverage"]["cut_videos"] == {"b": 7}
    assert (
        "note: 1 videos reach the limit of detections (suppression.max_per_video), which left out up to 7 more: 'b'"
        in str(scored)
    )


def test_numbers_that_hardly_mean_what_they_should_are_named(tmp_path: Path) -> None:
    truth = {"a": JUMP, "b": [(2.0, 8.0, "jump")]}
    rows = [(1.0 + shift / 10, 4.0, "jump") for shift in range(20)]

    def notes(rows: list[tuple[float, float, str]], *, times: float = 1.0, step: float = 0.0) -> str:
        predictions, annotations = write(tmp_path, {"a": rows}, truth)
        document = json.loads(predictions.read_text())
        for place, row in enumerate(document["results"]["a"]):
            row["segment"] = [times * second for second in row["segment"]]
            row["score"] += step * place
        predictions.write_text(json.dumps(document))
        return "\n".join(re2tal.evaluate(predictions, annotations).to_json()["coverage"]["notes"][1:])

    assert notes(rows, step=0.01) == ""
    assert notes(rows) == "all scores are equal, so that precision is that of an arbitrary order"
    assert notes([*rows, *rows[:2]], step=0.01) == ""
    assert notes([*JUMP, *JUMP, *JUMP]) == "2 predictions repeat another in all they say, and count as false"
    assert notes([(start, start, label) for start, _, label in rows], step=0.01).startswith(
        "20 of 20 predictions have no length, and match nothing: the localizer has not learned to regress boundaries"
    )
    frames, minutes = notes(rows, times=25.0, step=0.01), notes(rows, times=1 / 60, step=0.01)
    assert frames.startswith("20 of 20 predictions start after the end of their video; give segments in seconds, not")
    assert minutes.startswith("no prediction ends after 0.06667 s, and the last true action ends at 8 s; give segments")


def test_without_durations_no_prediction_is_behind_the_end_of_its_video(tmp_path: Path) -> None:
    rows = [(5.0 + start, 6.0 + start, "jump") for start in range(3)]
    predictions, annotations = write(tmp_path, {"a": [*JUMP, *rows], "b": rows}, {"a": JUMP, "b": []})
    document = json.loads(annotations.read_text())
    for entry in document["database"].values():
        del entry["duration"]
    annotations.write_text(json.dumps(document))
    assert re2tal.evaluate(predictions, annotations).to_json()["coverage"]["notes"] == []
    in_frames = [(25 * start, 25 * end, label) for start, end, label in rows]
    predictions, _ = write(tmp_path, {"a": in_frames}, {"a": JUMP, "b": []})
    annotations.write_text(json.dumps(document))
    notes = re2tal.evaluate(predictions, annotations).to_json()["coverage"]["notes"]
    assert any(one.startswith("3 of 3 predictions start after the end of their video; give seg") for one in notes)


def test_videos_of_another_subset_are_recognized(tmp_path: Path) -> None:
    predictions, annotations = write(tmp_path, {"a": JUMP}, {"a": JUMP, "b": JUMP})
    document = json.loads(annotations.read_text())
    document["database"]["b"]["subset"] = "training"
    annotations.write_text(json.dumps(document))
    with pytest.raises(
        ValueError, match=r"no predicted video is among .*; 1 of these videos are in subset 'validation'"
    ):
        re2tal.evaluate(predictions, annotations, re2tal.ScoringOptions(subset="training"))
