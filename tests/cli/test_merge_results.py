"""`re2tal merge-results`: what several files find becomes one file; what does not meet is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from re2tal.cli import main
from re2tal.evaluation.results import read_results
from re2tal.evaluation.suppression import SuppressionConfig
from re2tal.runs.epic_kitchens import evaluate_submission
from re2tal.runs.evaluation import ScoringOptions
from re2tal.runs.merging import MergeOptions, merge_results

Rows = list[tuple[float, float, str, float]]


def write(path: Path, found: dict[str, Rows]) -> Path:
    results = {
        video: [{"segment": [start, end], "label": label, "score": score} for start, end, label, score in rows]
        for video, rows in found.items()
    }
    path.write_text(json.dumps({"results": results}))
    return path


def test_repeats_are_suppressed_and_files_weighted(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", {"x": [(0, 10, "run", 0.8), (20, 30, "jump", 0.5)], "only a": [(0, 1, "run", 0.1)]})
    b = write(tmp_path / "b.json", {"v_x": [(0, 10, "run", 0.9), (0, 10, "jump", 0.3)]})
    options = MergeOptions(weights=(1.0, 0.5), suppression=SuppressionConfig(method="hard", iou_threshold=0.5))
    done = merge_results([a, b], tmp_path / "out.json", options)
    merged = read_results(tmp_path / "out.json")
    x = merged.of("x")
    rows = [
        (*segment, merged.classes[label], round(score, 6))
        for segment, label, score in zip(x.segments.tolist(), x.labels.tolist(), x.scores.tolist(), strict=True)
    ]
    # b's run, 0.9 * 0.5, lies on a's; its jump lies elsewhere than a's.
    assert rows == [(0.0, 10.0, "run", 0.8), (20.0, 30.0, "jump", 0.5), (0.0, 10.0, "jump", 0.15)]
    assert (done.num_videos, done.num_detections) == (2, 4)
    assert done.notes == (f"{b} lacks 1 of the 2 videos, which have the others' detections alone: 'only a'",)


def test_one_file_is_named_by_a_classifier_and_otherwise_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a.json", {"x": [(0, 10, "action", 0.8), (1, 10, "action", 0.5)]})
    classes = tmp_path / "cuhk.json"
    classes.write_text(json.dumps({"results": {"x": [0.25, 0.75]}, "class": ["jump", "run"]}))
    out = tmp_path / "named.json"
    with pytest.raises(SystemExit, match="0"):
        main(["merge-results", str(a), "--out", str(out), "--video-classes", str(classes), "--top-k", "1"])
    named = read_results(out)
    assert named.classes == ("run",)
    assert named.of("x").scores.tolist() == pytest.approx([0.6, 0.375])
    said = capsys.readouterr()
    assert (said.out, said.err) == (f"2 detections in 1 videos; {out}\n", "")
    # A detector of one class has a class of its own, which is gone then.
    write(a, {"x": [(0, 10, "dive", 0.8)]})
    done = merge_results([a], out, MergeOptions(video_classes=classes))
    assert done.notes == (f"all detections are called 'dive', and get the classes of {classes}",)


def test_files_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", {"x": [(0, 10, "run", 0.8), (0, 10, "jump", 0.8)]})
    b = write(tmp_path / "b.json", {"y": [(0, 10, "run", 0.8)]})
    out = tmp_path / "out.json"
    with pytest.raises(ValueError, match=r"a\.json, .*b\.json have no video in common: the first has 'x'"):
        merge_results([a, b], out)
    with pytest.raises(ValueError, match="no results were given; name the results JSON of two runs or more"):
        merge_results((), tmp_path / "out.json")
    with pytest.raises(ValueError, match="1 results and 2 weights were given"):
        merge_results([a], out, MergeOptions(weights=(1.0, 2.0)))
    with pytest.raises(ValueError, match=r"weights are \(-1\.0,\); give positive numbers"):
        merge_results([a], out, MergeOptions(weights=(-1.0,)))
    with pytest.raises(ValueError, match=r"video classes, .*b\.json, were given, but .*a\.json has classes of its own"):
        merge_results([a], out, MergeOptions(video_classes=b))
    with pytest.raises(ValueError, match=r"a\.json is given twice; give different files, and another one to write"):
        merge_results([a, tmp_path / "." / "a.json"], out)
    with pytest.raises(ValueError, match=r"a\.json is given twice"):
        merge_results([a], a)
    logits = write(tmp_path / "logits.json", {"x": [(0, 10, "run", 2.0), (20, 30, "run", -1.5)]})
    with pytest.raises(ValueError, match=r"logits\.json has scores down to -1\.5; give probabilities, not logits"):
        merge_results([a, logits], out)
    assert not out.exists()
    percent = write(tmp_path / "percent.json", {"x": [(0, 10, "run", 80.0), (20, 30, "jump", 50.0)]})
    kinds = "the files' scores differ in kind, so that some count for little; give weights. Highest are: "
    assert merge_results([a, percent], out).notes == (f"{kinds}{a} 0.8, {percent} 80",)
    assert merge_results([a, percent], out, MergeOptions(weights=(1.0, 0.01))).notes == ()


def test_verbs_and_nouns_that_overlap_become_a_submission_that_the_challenge_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verbs = write(tmp_path / "v.json", {"P01_11": [(0, 10, "id_003", 0.8), (20, 30, "id_004", 0.5)], "P02_1": []})
    nouns = write(tmp_path / "n.json", {"P01_11": [(0, 8, "id_014", 0.4), (0, 4, "id_015", 0.9), (22, 30, "5", 0.2)]})
    out = tmp_path / "submission.json"
    with pytest.raises(SystemExit, match="0"):
        main(["merge-results", str(verbs), str(nouns), "--out", str(out), "--verb-noun-tiou", "0.5"])
    printed = capsys.readouterr()
    assert printed.out == f"2 detections in 1 videos; {out}\n"
    assert printed.err == (
        f"note: {nouns} lacks 1 videos of the other file, which are left out: 'P02_1'\n"
        f"note: {verbs} has 2 verbs, {nouns} 3 nouns\n"
    )
    swapped = merge_results([nouns, verbs], tmp_path / "swapped.json", MergeOptions(verb_noun_tiou=0.5))
    assert swapped.notes[-1] == f"{nouns} has 3 verbs, {verbs} 2 nouns: more verbs than nouns, are they swapped?"
    rows = json.loads(out.read_text())["results"]["P01_11"]
    assert [(row["verb"], row["noun"], row["action"]) for row in rows] == [(3, 14, "3,14"), (4, 5, "4,5")]
    # 0.8 of the verb's [0, 10] and 0.4 of the noun's [0, 8]; 0.5 of [20, 30] and 0.2 of [22, 30].
    assert rows[0]["segment"] == pytest.approx([0, (0.8 * 10 + 0.4 * 8) / 1.2], rel=1e-6)
    assert rows[1]["segment"] == pytest.approx([(0.5 * 20 + 0.2 * 22) / 0.7, 30], rel=1e-6)
    assert [row["score"] for row in rows] == pytest.approx([0.32, 0.1])
    table = tmp_path / "EPIC_100_validation.csv"
    table.write_text(
        "video_id,start_timestamp,stop_timestamp,verb_class,noun_class\nP01_11,00:00:00.00,00:00:10.00,3,14\n"
    )
    assert evaluate_submission(out, table, ScoringOptions()).average_map == pytest.approx(1)

    for label in ("take", "id_097"):  # the 98th is a noun
        words = write(tmp_path / "words.json", {"P01_11": [(0, 10, label, 0.8)]})
        with pytest.raises(ValueError, match=rf"label '{label}' is no number of a verb; give .* id_000 to id_096"):
            merge_results([words, nouns], tmp_path / "none.json", MergeOptions(verb_noun_tiou=0.5))
    for options in (MergeOptions(verb_noun_tiou=0.0), MergeOptions(verb_noun_tiou=0.5, weights=(1.0, 2.0))):
        with pytest.raises(ValueError, match=r"verbs first, and no other option but suppression\.max_per_video"):
            merge_results([verbs, nouns], tmp_path / "none.json", options)
    assert not (tmp_path / "none.json").exists()


def test_labels_that_look_alike_are_told(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", {"x": [(0, 10, "st\u00fcrzen", 0.8)]})
    b = write(tmp_path / "b.json", {"x": [(0, 10, "stu\u0308rzen", 0.8)]})
    notes = merge_results([a, b], tmp_path / "out.json").notes
    assert "labels 'st\\xfcrzen' (1 times) and 'stu\\u0308rzen' (1 times) differ only by case" in notes[-1]
