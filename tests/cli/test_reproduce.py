"""`re2tal reproduce`: on tiny stand-ins for THUMOS14 and ActivityNet in their real layouts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from re2tal.cli import main
from re2tal.config import RunConfig
from re2tal.data.building.catalog import DATASETS
from re2tal.distributed import World
from re2tal.evaluation.average_precision import MapReport, mean_average_precision
from re2tal.evaluation.comparison import Spread
from re2tal.evaluation.ground_truth import read_ground_truth
from re2tal.evaluation.matching import match_predictions
from re2tal.evaluation.protocols import TIOU_THRESHOLDS
from re2tal.evaluation.results import read_results
from re2tal.files import sha256_of
from re2tal.recipes import find_recipe
from re2tal.runs import reproduction
from re2tal.runs.evaluation import Evaluated, blocked_by
from re2tal.runs.lock import locked
from re2tal.runs.published import PUBLISHED
from re2tal.runs.reproduction_card import Card
from re2tal.runs.reproduction_checks import check_data
from re2tal.strict_json import read_json

SECONDS, RATE = 6, 15
THUMOS_CLASSES = DATASETS["thumos14"].classes or ()
ANET_CLASSES = ("Archery", "Zumba")


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    return end.value.code or 0


def write_video(path: Path, *, seed: int) -> None:
    pictures = np.random.default_rng(seed).integers(0, 255, (SECONDS * RATE, 1, 1, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.broadcast_to(picture, (32, 32, 3)).copy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def entry(subset: str, labels: list[str]) -> dict:
    annotations = [
        {"segment": [1.0 + 2 * place, 2.5 + 2 * place], "label": label} for place, label in enumerate(labels)
    ]
    return {"subset": subset, "duration": float(SECONDS), "annotations": annotations}


@pytest.fixture(scope="module")
def thumos(tmp_path_factory) -> Path:
    """THUMOS14 in small: its names of subsets and videos, a blocked test video, and one that nobody has."""
    folder = tmp_path_factory.mktemp("thumos")
    database = {}
    for number in range(2):
        database[f"video_validation_000000{number}"] = entry("Validation", ["Diving", "CliffDiving"])
        database[f"video_test_000000{number}"] = entry("Test", ["Diving", "Ambiguous"])
    database["video_test_0000270"] = entry("Test", ["Diving"])
    for number, name in enumerate(database):
        write_video(folder / "videos" / f"{name}.mp4", seed=number)
    database["video_test_0000009"] = entry("Test", ["Billiards"])
    (folder / "annotations.json").write_text(json.dumps({"version": "THUMOS-14", "database": database}))
    build(folder, "thumos14")
    return folder


@pytest.fixture(scope="module")
def activitynet(tmp_path_factory) -> Path:
    """ActivityNet-1.3 in small: ids of 11 characters, files with v_ before them, and a classifier's scores."""
    folder = tmp_path_factory.mktemp("activitynet")
    training, validation = ("-aaaaaaaaa0", "_aaaaaaaaa1"), ("bbbbbbbbbb0", "bbbbbbbbbb1")
    database = {name: entry("training", [ANET_CLASSES[place]]) for place, name in enumerate(training)}
    database |= {name: entry("validation", [ANET_CLASSES[place]]) for place, name in enumerate(validation)}
    for number, name in enumerate(database):
        write_video(folder / "videos" / f"v_{name}.mp4", seed=number)
    (folder / "annotations.json").write_text(json.dumps({"version": "VERSION 1.3", "database": database}))
    scores = {name: [0.9 - 0.8 * place, 0.1 + 0.8 * place] for place, name in enumerate(validation)}
    (folder / "classes.json").write_text(json.dumps({"results": scores, "class": ANET_CLASSES}))
    build(folder, "activitynet")
    return folder


def build(folder: Path, dataset: str) -> None:
    files = ["--videos", folder / "videos", "--annotations", folder / "annotations.json", "--out", folder / "shards"]
    run("shards", "build", "--dataset", dataset, *files, "--workers", 1, "--max-rejected", 0.9)


def reproduce(folder: Path, dataset: str, out: Path, *options: object) -> tuple[int, dict]:
    files = ["--annotations", folder / "annotations.json", "--shards", folder / "shards", "--out", out]
    code = run("reproduce", dataset, *files, *options)
    card = json.loads((out / "card.json").read_text()) if (out / "card.json").is_file() else {}
    return code, card


def test_thumos_in_tiny_from_data_to_a_card(thumos, tmp_path, capsys):
    code, card = reproduce(thumos, "thumos14", tmp_path / "run", "--tiny")
    assert code == 1  # the data is not all of THUMOS14
    said = "\n".join(card["problems"])
    assert "training: 2 videos, 198 fewer than 200" in said
    assert "1 of 3 listed videos are not in the shards: video_test_0000009" in said
    assert "video_test_0000270" not in said
    assert card["facts"]["data"]["validation"]["videos"] == 2
    assert card["facts"]["plan"]["time"]["hours"] >= 0
    assert card["training"]["steps"] >= 1

    # The score, once more, of the written results against the file, without the blocked video.
    results = read_results(tmp_path / "run" / "results.json")
    truths = read_ground_truth(thumos / "annotations.json", subset="Test")
    report = mean_average_precision(
        match_predictions(
            results.predictions,
            [one for one in truths if one.video_id != "video_test_0000270"],
            classes=results.classes,
            protocol="opentad",
            tiou_thresholds=TIOU_THRESHOLDS["thumos14"],
        )
    )
    rows = {(row["source"], row["tiou"]): row for row in card["comparison"]}
    paper = rows["Re2TAL, abstract", "0.5"]
    assert paper["published"] == 64.9
    assert paper["here"] == pytest.approx(100 * report.map_by_tiou["0.5"])
    assert paper["difference"] == pytest.approx(paper["here"] - 64.9)
    assert rows["OpenTAD, same settings", "average"]["here"] == pytest.approx(100 * report.average_map)
    # What a dry run would write in its place.
    assert reproduce(thumos, "thumos14", tmp_path / "run", "--tiny", "--dry-run")[1] == card
    assert "holds a run, whose card a dry run would replace" in capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["training"]["epochs"] = 7
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert reproduce(thumos, "thumos14", tmp_path / "run", "--tiny", "--resume")[0] == 2
    assert "holds a run of 7 epochs with" in capsys.readouterr().err
    assert paper["interval"][0] <= paper["here"] <= paper["interval"][1]
    assert paper["inside"] is False  # a network of one epoch
    assert card["scores"]["bootstrap"]["draws"] == 1000
    text = (tmp_path / "run" / "card.md").read_text()
    assert "64.90" in text
    assert "one seed was trained: how far seeds differ is in no interval here" in text
    assert "only rehearses" in text


def test_a_card_says_whether_the_interval_holds_what_was_published():
    # At each tIoU 101 draws, from 60 % in steps of 0.1: the middle 95 % of them are 60.25 to 69.75 %.
    thresholds = (0.3, 0.5)
    precision = MapReport("opentad", thresholds, ("Diving",), np.full((2, 1), 0.65), (1,), (1,), coverage=None)
    draws = np.linspace(0.60, 0.70, 101)
    spread = Spread(thresholds, np.full((1, 2), 0.65), np.stack([draws, draws], axis=1), "all")
    card = Card("thumos14", tiny=False, published=PUBLISHED["thumos14", "slowfast"])
    card.compare(Evaluated(precision, None, spread=spread), {})
    paper, opentad, average = card.rows()
    assert (paper["published"], paper["inside"]) == (64.9, True)
    assert paper["interval"] == pytest.approx([60.25, 69.75])
    assert (opentad["published"], opentad["inside"]) == (74.27, False)
    assert average["interval"] == pytest.approx([60.25, 69.75])
    lines = card.verdicts().splitlines()
    assert lines[2].split()[-6:] == ["64.90", "65.00", "+0.10", "[60.25,", "69.75]", "yes"]
    assert lines[3].split()[-1] == "no"


def test_activitynet_in_tiny_is_scored_under_a_classifiers_names(activitynet, tmp_path):
    classes = activitynet / "classes.json"
    code, card = reproduce(activitynet, "activitynet", tmp_path / "run", "--tiny", "--video-classes", classes)
    assert code == 1
    results = read_results(tmp_path / "run" / "named_results.json")
    assert results.classes == ANET_CLASSES
    assert list(card["scores"]["classes"]) == list(ANET_CLASSES)
    assert card["comparison"][0]["published"] == 37.01
    assert card["comparison"][0]["here"] == pytest.approx(100 * card["scores"]["average_map"])
    assert not any("video-classes" in problem for problem in card["problems"])


def test_a_dry_run_checks_and_plans_the_published_network_and_trains_nothing(thumos, tmp_path):
    code, card = reproduce(thumos, "thumos14", tmp_path / "run", "--dry-run", "--backbone", "swin")
    assert code == 1
    assert any("none were given" in problem for problem in card["problems"])
    assert card["facts"]["plan"]["recipe"] == "thumos14_re2swin_tiny"
    assert card["facts"]["plan"]["clips a step"] == 2
    assert "swin3d_tiny" in card["facts"]["plan"]["step"]
    assert card["facts"]["plan"]["peak bytes of a rank"] > 1e9
    assert card["comparison"][0] == {
        "source": "Re2TAL, as quoted by ViT-TAD",
        "tiou": "0.5",
        "published": 62.4,
        "here": None,
        "difference": None,
        "interval": None,
        "inside": None,
    }
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["card.json", "card.md"]


def test_what_cannot_be_compared_is_refused_before_any_work(thumos, activitynet, tmp_path, capsys, monkeypatch):
    code, card = reproduce(thumos, "thumos14", tmp_path / "run")
    assert (code, card) == (2, {})
    assert "no accelerator" in capsys.readouterr().err
    monkeypatch.setattr(
        "re2tal.runs.reproduction_checks.default_device", lambda: type("Device", (), {"type": "other"})()
    )
    assert reproduce(thumos, "thumos14", tmp_path / "run")[0] == 2
    assert "--weights is missing" in capsys.readouterr().err
    weights = tmp_path / "swin-0123abcd.pth"
    weights.write_bytes(b"something else")
    assert reproduce(activitynet, "activitynet", tmp_path / "run", "--weights", weights)[0] == 2
    assert "--video-classes is missing" in capsys.readouterr().err
    assert reproduce(thumos, "thumos14", tmp_path / "run", "--weights", weights)[0] == 2
    assert f"has SHA-256 {sha256_of(weights)[:16]}..., but its name says 0123abcd" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_files_that_do_not_belong_together_are_found_before_training(thumos, activitynet, tmp_path, capsys):
    document = json.loads((thumos / "annotations.json").read_text())
    first = document["database"]["video_validation_0000000"]["annotations"]
    first[0]["label"], first[1]["segment"] = "Billiards", [0.5, 2.5]
    (tmp_path / "other.json").write_text(json.dumps(document))
    files = ["--annotations", tmp_path / "other.json", "--shards", thumos / "shards", "--out", tmp_path / "a"]
    assert run("reproduce", "thumos14", *files, "--tiny", "--dry-run") == 1
    problems = json.loads((tmp_path / "a" / "card.json").read_text())["problems"]
    line = (
        "1 videos have other actions than in the file: video_validation_0000000 has 2 that the file lacks, and lacks 2"
    )
    assert f"training: {line}" in problems

    files = ["--annotations", activitynet / "annotations.json", "--shards", thumos / "shards", "--out", tmp_path / "b"]
    assert run("reproduce", "activitynet", *files, "--tiny") == 2
    assert "have no training video in common; give the file they were built from" in capsys.readouterr().err

    for name, classes, message in (
        ("absent.json", None, "absent.json"),
        ("other_ids.json", {"results": {"c": [0.5, 0.5]}, "class": ANET_CLASSES}, "is missing, like all 2 videos"),
    ):
        if classes:
            (tmp_path / name).write_text(json.dumps(classes))
        assert (
            reproduce(activitynet, "activitynet", tmp_path / "c", "--tiny", "--video-classes", tmp_path / name)[0] == 2
        )
        assert message in capsys.readouterr().err
        assert not (tmp_path / "c").exists()
    scores = {"results": {"bbbbbbbbbb0": [0.5, 0.5], "bbbbbbbbbb1": [0.5, 0.5]}, "class": ["Archery", "Zumba class"]}
    (tmp_path / "names.json").write_text(json.dumps(scores))
    options = ["--tiny", "--dry-run", "--video-classes", tmp_path / "names.json"]
    _, card = reproduce(activitynet, "activitynet", tmp_path / "d", *options)
    assert any(
        "lacks 1 of the 2 classes of the data, which will never be found: Zumba" in one for one in card["problems"]
    )


def test_without_the_list_of_blocked_videos_activitynets_score_is_of_others(activitynet, tmp_path):
    document = json.loads((activitynet / "annotations.json").read_text())
    others = [f"v{number:010d}" for number in range(4924)]
    document["database"] |= {name: entry("validation", []) for name in others}
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    (tmp_path / "blocked.json").write_text(json.dumps(others[:198]))

    def problems(blocked: Path | None) -> list[str]:
        return check_data("activitynet", tmp_path / "annotations.json", activitynet / "shards", blocked).problems

    line = "validation: 4926 videos count, and published scores are of 4728: a JSON list of 198 validation videos"
    assert any(one.startswith(line) for one in problems(None))
    assert not any("published scores are of" in one for one in problems(tmp_path / "blocked.json"))


def test_blocked_videos_in_shards_are_a_problem_where_they_are_trained_on(activitynet, tmp_path):
    def checked(blocked: list[str]):
        (tmp_path / "blocked.json").write_text(json.dumps(blocked))
        return check_data(
            "activitynet", activitynet / "annotations.json", activitynet / "shards", tmp_path / "blocked.json"
        )

    scored = checked(["bbbbbbbbbb1"])
    assert scored.facts["validation"]["blocked, and not scored"] == 1
    assert not any("shards" in one for one in scored.problems)
    trained = checked(["_aaaaaaaaa1"])
    line = (
        "training: 1 videos of the shards are blocked, and would be trained on; build them with --blocked: _aaaaaaaaa1"
    )
    assert line in trained.problems


def test_subsets_may_have_their_other_names(activitynet, tmp_path, monkeypatch):
    text = (activitynet / "annotations.json").read_text().replace("training", "train").replace("validation", "val")
    (tmp_path / "annotations.json").write_text(text)
    for name, other in (("training", "train"), ("validation", "val")):
        shutil.copytree(activitynet / "shards" / name, tmp_path / "shards" / other)
    facts = check_data("activitynet", tmp_path / "annotations.json", tmp_path / "shards", None).facts
    assert facts["validation"]["listed"] == facts["validation"]["videos"] == 2

    seen = []
    monkeypatch.setattr(reproduction, "train", lambda *_, **__: SimpleNamespace(interrupted=False))
    monkeypatch.setattr(reproduction, "detect", lambda _, shards, wanted: seen.append(shards))
    asked = reproduction.Reproduction(
        "activitynet", tmp_path, tmp_path / "shards", video_classes=activitynet / "classes.json"
    )
    published = PUBLISHED["activitynet", "swin"]
    config = find_recipe(published.recipe)
    card = Card("activitynet", tiny=True, published=published)
    assert isinstance(config, RunConfig)
    assert reproduction._train_and_compare(asked, config, card, World(rank=1, world_size=2)) == 0
    assert seen == [tmp_path / "shards" / "val"]


def test_training_leaves_out_the_videos_that_the_card_leaves_out(activitynet, tmp_path, monkeypatch):
    def train(config: RunConfig, **_: object) -> SimpleNamespace:
        left_out.append(blocked_by(config.evaluation))
        return SimpleNamespace(interrupted=True)

    left_out: list[frozenset[str]] = []
    monkeypatch.setattr(reproduction, "train", train)
    config, blocked = find_recipe("activitynet_re2swin_tiny"), tmp_path / "blocked.txt"
    card = Card("activitynet", tiny=True, published=PUBLISHED["activitynet", "swin"])
    asked = reproduction.Reproduction(
        "activitynet", activitynet / "annotations.json", activitynet / "shards", blocked=blocked, out=tmp_path / "run"
    )
    assert isinstance(config, RunConfig)
    blocked.write_text("v_bbbbbbbbbb1.mp4\n")
    reproduction._train_and_compare(asked, config, card, World())
    assert left_out == [{"v_bbbbbbbbbb1"}]
    # Beside an earlier run, the list is part of it.
    blocked.write_text("bbbbbbbbbb0\n")
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"blocked\.json is of an earlier run, and lists other videos"):
            reproduction._train_and_compare(replace(asked, resume=resume), config, card, World())
    # A run that is at work reads it at each evaluation.
    with locked(tmp_path / "run"), pytest.raises(ValueError, match="is in use by"):
        reproduction._train_and_compare(replace(asked, overwrite=True), config, card, World())
    assert read_json(tmp_path / "run" / "blocked.json") == ["v_bbbbbbbbbb1"]
    reproduction._train_and_compare(replace(asked, overwrite=True), config, card, World())
    assert left_out[1:] == [{"bbbbbbbbbb0"}]


def test_a_date_at_the_end_of_a_name_is_no_checksum(thumos, tmp_path, capsys):
    weights = tmp_path / "swin-20220930.pth"
    weights.write_bytes(b"something else")
    assert reproduce(thumos, "thumos14", tmp_path / "run", "--weights", weights, "--dry-run")[0] == 2
    assert "but its name says" not in capsys.readouterr().err


def test_ranks_that_cannot_share_a_step_are_refused(thumos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "re2tal.runs.reproduction.resolve_world",
        lambda environ: __import__("re2tal.distributed", fromlist=["World"]).World(world_size=4),
    )
    assert reproduce(thumos, "thumos14", tmp_path / "run", "--dry-run")[0] == 2
    assert "takes 2 clips a step in batches of 1, which 4 ranks cannot share evenly" in capsys.readouterr().err
