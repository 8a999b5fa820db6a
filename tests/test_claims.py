"""benchmarks/claims.py: measurements are kept, failures are named, and the page says what was not run."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def cells(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from evidence import cells

    yield cells
    for name in [name for name in sys.modules if name.partition(".")[0] == "evidence"]:
        del sys.modules[name]


def test_what_is_measured_is_not_measured_again_and_a_failure_ends_nothing_else(cells, tmp_path, capsys):
    calls = []

    def measured(name):
        calls.append(name)
        if name == "bad" and calls.count("bad") == 1:
            raise RuntimeError("broken on purpose")
        return {"value": len(name)}

    names = ("good", "bad", "better")
    part = cells.Part(
        "title", lambda options: {name: lambda name=name: measured(name) for name in names}, lambda *_: []
    )
    options = cells.Options(1, True, tmp_path, tmp_path)
    assert cells.run_part("p", part, options, tmp_path) == ["p: bad: RuntimeError: broken on purpose"]
    assert {key: cell["figures"] for key, cell in cells.read_part(tmp_path / "p.json").items()} == {
        "good": {"value": 4},
        "better": {"value": 6},
    }
    assert cells.run_part("p", part, options, tmp_path) == []
    assert calls == ["good", "bad", "better", "bad"]


def test_a_part_that_lacks_its_data_is_named(cells, tmp_path):
    def no_data(options):
        raise ValueError("fetch the data set")

    part = cells.Part("title", no_data, lambda *_: [])
    failed = cells.run_part("p", part, cells.Options(1, True, tmp_path, tmp_path), tmp_path)
    assert failed == ["p: ValueError: fetch the data set"]


def test_cells_side_by_side_train_what_one_of_them_keeps_once(cells, monkeypatch, tmp_path):
    from evidence import training

    calls, folder = [], tmp_path / "kept"

    def slow(*arguments):
        calls.append(arguments)
        time.sleep(0.2)
        folder.mkdir()
        (folder / "summary.json").write_text("{}")

    monkeypatch.setattr(training, "command_line", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(training.trained, training.demo(), keep=folder)
        time.sleep(0.1)
        pool.submit(training.kept, training.demo(), folder).result()
    assert first.result() == {}
    assert len(calls) == 1


def test_an_interval_is_students(cells):
    # 1, 2, 3 %: standard deviation 1, so 4.30 / sqrt(3) on either side.
    assert cells.mean_and_interval([0.01, 0.02, 0.03]) == "2.0 ± 2.5"
    assert cells.mean_and_interval([0.5]) == "50.0"
    # Of 11 values, 2.23 standard errors; never fewer.
    assert cells.interval([0.0] * 5 + [0.11] + [0.22] * 5)[1] >= 2.228 * 11 / 11**0.5
    assert cells.verdict([0.01, 0.02, 0.03], aim=-1).endswith("reached.")  # from -0.5 on
    assert cells.verdict([0.01, 0.02, 0.03], aim=4).endswith("**not settled**.")  # up to 4.5
    assert cells.verdict([0.01, 0.02, 0.03], aim=5).endswith("**not reached**.")


def test_the_page_compares_pairs_and_says_what_was_not_run(cells, tmp_path):
    from evidence.page import write_page
    from evidence.parts import PARTS

    def cell(form, seed, average):
        figures = {"average_map": average, "map": {"0.3": average, "0.7": average}, "train_seconds": 1.0}
        where = {
            "date": "2026-01-01",
            "seconds": 1.0,
            "machine": "a machine, load 0.5",
            "command": "c",
            "revision": "r",
        }
        return {f"{form} / swin3d_nano / actionformer / 1 epochs / seed {seed}": {"figures": figures, **where}}

    done = {}
    for seed, (frozen, rewired) in enumerate([(0.10, 0.17), (0.20, 0.26)]):
        done |= cell("frozen at random", seed, frozen) | cell("end to end, rewired", seed, rewired)
    out = tmp_path / "evidence"
    out.mkdir()
    (out / "real.json").write_text(json.dumps({"cells": done}))
    write_page(out, PARTS)
    assert "every seed" not in (tmp_path / "evidence.md").read_text()
    (out / "real.txt").write_text("Rewired was higher in every seed.")
    write_page(out, PARTS)
    page = (tmp_path / "evidence.md").read_text()
    assert "Rewired was higher in every seed." in page
    assert "1 epoch" in page
    assert "1 epochs" not in page
    # 7 and 6 points: mean 6.5, deviation 0.707, so 12.71 * 0.707 / sqrt(2) = 6.35 on either side.
    assert "+6.5 ± 6.4 points (aim: at least +5), paired by seed: **not settled**." in " ".join(page.split())
    assert "Not run yet: `python benchmarks/claims.py --part zero`." in page
    assert (out / "real.svg").is_file()


def test_recognizers_are_compared_with_their_original(cells):
    from evidence import recognizers

    done = {}
    for seed, (original, tuned) in enumerate([(0.90, 0.88), (0.80, 0.79), (0.85, 0.82)]):
        for form, top1 in (("original", original), ("rewired, + 1 epochs", 0.1), ("rewired, + 3 epochs", tuned)):
            key = f"recognizer / {form} / swin3d_nano / 30 epochs / seed {seed}"
            done[key] = {"top1": top1, "train_seconds": 60.0}
    lines = recognizers.show(done)
    # 2, 1 and 3 points less: mean 2, standard deviation 1, so 4.30 / sqrt(3) on either side.
    assert lines[-1].endswith("-2.0 ± 2.5 points (aim: at least -1), paired by seed: **not settled**.")
    assert "| original | 85.0 ± 12.4 | 60 | 3 |" in lines
    one_seed = {key: figures for key, figures in done.items() if key.endswith("seed 1")}
    assert recognizers.show(one_seed)[-1].endswith(
        "-1.0 points (aim: at least -1). One seed, so no interval and no verdict."
    )


def test_rewired_recognizers_start_from_the_original_that_was_kept(cells, monkeypatch, tmp_path):
    from evidence import recognizers, training

    trained, rates = [], []

    def stand_in(run, *, keep=None):
        backbone = run.backbone
        trained.append((backbone.rewired, backbone.segment, run.training.epochs, backbone.weights or run.start_from))
        rates.append(run.optimizer.backbone_learning_rate)
        if keep is not None:
            keep.mkdir(parents=True)
            (keep / "summary.json").write_text("{}")
        return {}

    monkeypatch.setattr(recognizers, "trained", stand_in)
    monkeypatch.setattr(training, "trained", stand_in)
    monkeypatch.setattr(recognizers, "built_clips", lambda options, size: tmp_path / "shards")
    monkeypatch.setattr(training, "built", lambda options, name: tmp_path / name)
    made = recognizers.cells(cells.Options(1, False, tmp_path, tmp_path))
    assert len(made) == 9 + 8 + 3 + 12
    for form in ("rewired, + 2 epochs", "rewired, + 2 epochs gently", "in segments, + 2 epochs"):
        made[f"recognizer / {form} / swin3d_nano / 20 epochs / seed 0"]()
    kept, plain = tmp_path / "original-swin3d_nano-20-0", "end-to-end-plain-swin3d_nano-actionformer-32-0"
    assert trained == [
        (False, None, 32, None),
        (False, None, 20, str(tmp_path / "detectors" / plain / "model.safetensors")),
        (True, None, 2, kept),
        (True, None, 2, kept),
        (True, 2, 2, kept),
    ]
    assert rates[2:] == [5e-4, 1e-4, 5e-4]


def test_features_of_a_recognizer_are_its_weights_in_a_frozen_plain_backbone(cells, monkeypatch, tmp_path):
    from evidence import end_to_end, recognizers

    from re2tal.config import load_config, save_config

    def stand_in(run):
        save_config(tmp_path / "config.json", run)
        return {}

    monkeypatch.setattr(recognizers, "built_clips", lambda options, size: tmp_path / "clips" / "shards")
    monkeypatch.setattr("evidence.training.built", lambda options, name: tmp_path / "shards")
    monkeypatch.setattr(recognizers, "kept_by", lambda train, folder: folder)
    monkeypatch.setattr(end_to_end, "trained", stand_in)
    made = end_to_end.demo_cells(cells.Options(1, False, tmp_path, tmp_path))
    (measure,) = (measure for key, measure in made.items() if key.startswith("frozen, from recognition / slowfast"))
    measure()
    backbone = load_config(tmp_path / "config.json").backbone
    assert backbone.frozen
    assert not backbone.rewired
    assert backbone.weights == str(tmp_path / "clips" / "original-slowfast_nano-20-0" / "model.safetensors")


def test_reference_vectors_are_counted_by_module_and_failures_are_named(cells, tmp_path):
    from xml.etree import ElementTree

    from evidence import peers

    case = '<testcase classname="tests.parity.{}" name="{}">{}</testcase>'.format
    report = ElementTree.fromstring(
        "<testsuites><testsuite>"
        + case("test_swin", "a", "")
        + case("test_swin", "b", "<failure/>")
        + case("test_swin", "c", "<skipped/>")
        + case("test_vsgn", "d", "<error/>")
        + "</testsuite></testsuites>"
    )
    figures = {**peers.counted(report), "files": 90}
    swin, vsgn = figures["modules"]["test_swin"], figures["modules"]["test_vsgn"]
    assert (swin["passed"], swin["failed"], swin["skipped"], vsgn["failed"]) == (1, 1, 1, 1)
    assert swin["about"].startswith("Video Swin")
    lines = peers.show({"reference vectors": figures}, tmp_path)
    assert "| all | 1 | 2 | 1 |" in lines
    assert {"- failed: `test_swin::b`", "- failed: `test_vsgn::d`"} <= set(lines)


def test_sizes_are_compared_where_they_need_equal_memory_and_share_a_seed(cells):
    from evidence import costs

    def run(seed, score, peak):
        return {seed: {"average_map": score, "peak_gib": peak}}

    plain = {("plain", "32 pixels"): run("seed 0", 0.5, 1.0), ("rewired", "48 pixels"): run("seed 0", 0.55, 0.5)}
    [said] = costs._at_equal_memory({**plain, ("rewired", "64 pixels"): run("seed 0", 0.6, 1.04)})
    assert said.startswith("- Rewired at 64 pixels (1.04 x the memory), less plain at 32 pixels: +10.0 points")
    [said] = costs._at_equal_memory({**plain, ("rewired", "64 pixels"): run("seed 0", 0.6, 1.06)})
    assert said.startswith("- Rewired at 48 pixels (0.50 x the memory)")
    assert list(costs._at_equal_memory({**plain, ("rewired", "64 pixels"): run("seed 1", 0.6, 1.0)})) == []
