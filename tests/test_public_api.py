"""What `import re2tal` offers: the examples of its docstrings, run on tiny data, and how little the import costs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from data.folders import indexed, write_shards
from data.numbered import encode_numbered
from distributed.commands import forget_a_world_of_one
from distributed.ranks import run_ranks

import re2tal
from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.config import DataConfig, RunConfig, build_detector, save_config
from re2tal.data.streaming.stream import ClipConfig
from re2tal.data.streaming.windows import Slide
from re2tal.evaluation.suppression import SuppressionConfig
from re2tal.localizers.pyramid.actionformer import ActionFormerConfig
from re2tal.runs.trained import open_detector
from re2tal.structures import Action
from re2tal.training.export import read_model, write_model

CLASSES = ("jump", "run")
ROOT = Path(__file__).parents[1]


def config(shards: Path) -> RunConfig:
    return RunConfig(
        name="tiny",
        num_steps=8,
        data=DataConfig(
            shards=shards,
            clips=ClipConfig(windowing=Slide(num_frames=16, frames_per_second=8.0), size=32, fit="stretch", workers=0),
        ),
        backbone=BackboneConfig(name="swin3d_nano"),
        localizer=ActionFormerConfig(
            channels=16,
            num_embedding_convs=1,
            num_stem_blocks=1,
            max_num_steps=8,
            regression_ranges=((0, 4), (4, 10_000)),
        ),
        suppression=SuppressionConfig(max_per_video=5),
    )


def script(code: str, *arguments: object) -> str:
    """What a Python program of its own prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def test_the_import_brings_nothing_heavy_along():
    code = (
        "import re2tal, sys; print(re2tal.__version__); sys.exit(bool({'torch', 'numpy', 'tyro'} & sys.modules.keys()))"
    )
    assert script(code).strip() == version("re2tal")


def test_every_name_is_there_and_an_unknown_one_is_answered_with_them():
    assert set(re2tal.__all__) <= set(dir(re2tal))
    assert all(getattr(re2tal, name) is not None for name in re2tal.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'detekt'; it has Detector, Evaluated"):
        re2tal.detekt  # noqa: B018


def test_rewire_is_called_alike_before_and_after_its_package_is_imported():
    ways = ("", "import re2tal.rewire.stage", "from re2tal.rewire import rewire")
    code = """
import os, sys, torch  # once for all ways, each of which has an interpreter without re2tal
for before in sys.argv[1:]:
    if not (child := os.fork()):
        import re2tal
        exec(before)
        from re2tal.backbones import BackboneConfig, build_backbone
        print(re2tal.rewire(build_backbone(BackboneConfig(name="swin3d_nano", rewired=False))), end="---", flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
    network = build_backbone(BackboneConfig(name="swin3d_nano", rewired=False))
    wanted = str(re2tal.rewire.rewire(network))
    assert script(code, *ways).split("---") == [wanted] * len(ways) + [""]


def test_a_video_file_becomes_actions_in_seconds(tmp_path: Path):
    settings = config(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(folder / "config.json", settings)
    torch.manual_seed(0)
    write_model(folder / "model.safetensors", build_detector(settings, CLASSES).state_dict(), classes=CLASSES)
    video = tmp_path / "party (1).mp4"
    video.write_bytes(encode_numbered(75, fps=25))

    detector = re2tal.load_detector(folder, device="cpu")
    actions = detector.detect(video)
    assert 1 <= len(actions) <= 5
    for action in actions:
        assert 0 <= action.start_seconds <= action.end_seconds <= 3
        assert action.label in CLASSES
    scores = [action.score for action in actions]
    assert scores == sorted(scores, reverse=True)
    with pytest.raises(ValueError, match=r"no\.mp4 is not a file; give a video file"):
        detector.detect(tmp_path / "no.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    with pytest.raises(ValueError, match=r"broken\.mp4"):
        detector.detect(tmp_path / "broken.mp4")


def trained_in_python(config: str, out: str) -> dict:
    forget_a_world_of_one()
    run = re2tal.load_run(config)
    run = replace(
        run,
        training=replace(run.training, epochs=2),
        schedule=replace(run.schedule, warmup_epochs=0.5),
        engine=replace(run.engine, batch_size=1),
    )
    trained = re2tal.train(run, out=out)
    return {
        "interrupted": trained.interrupted,
        "folder": str(trained.folder),
        "average_map": trained.summary["average_map"],
    }


def test_a_configuration_becomes_a_run_folder_and_its_results_a_score(tmp_path: Path):
    database = {}
    for subset in ("training", "validation"):
        actions = [Action(0.5, 1.5, CLASSES[0]), Action(1.6, 2.9, CLASSES[1])]
        name = f"{subset}-video"
        videos = {name: (encode_numbered(90), indexed(90, video_id=name, actions=actions))}
        write_shards(tmp_path / "shards" / subset, videos, per_shard=1, classes=CLASSES)
        database[name] = {
            "subset": subset,
            "duration": 3.0,
            "annotations": [{"segment": [one.start_seconds, one.end_seconds], "label": one.label} for one in actions],
        }
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps({"database": database}))
    save_config(tmp_path / "config.json", config(tmp_path / "shards"))
    files = {"config": str(tmp_path / "config.json"), "out": str(tmp_path / "run")}
    [trained] = run_ranks(trained_in_python, world_size=1, timeout_seconds=280, **files)
    assert (trained["interrupted"], trained["folder"]) == (False, str(tmp_path / "run"))
    scored = re2tal.evaluate(tmp_path / "run" / "results.json", annotations)
    assert scored.average_map == pytest.approx(trained["average_map"])
    check_that_its_newest_checkpoint_is_the_same_model(tmp_path / "run")


def check_that_its_newest_checkpoint_is_the_same_model(run: Path) -> None:
    """Which is all there is of a run that was interrupted."""
    trained = read_model(run / "model.safetensors")
    (run / "model.safetensors").unlink()
    opened = open_detector(run)
    assert opened.checkpoint == "step-00000002"
    assert opened.classes == trained.classes
    assert opened.model.wiring == trained.wiring
    assert opened.model.weights.keys() == trained.weights.keys()
    for name, value in trained.weights.items():
        assert torch.equal(opened.model.weights[name], value), name
    opened.network()
    (state,) = (run / "checkpoints" / "step-00000002").glob("rank-*.pt")
    state.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is sound: step-00000002: rank-00000\.pt has 7 bytes"):
        open_detector(run)
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    with pytest.raises(ValueError, match=r"has no model\.safetensors and no checkpoint yet; wait for the first one"):
        open_detector(run)
