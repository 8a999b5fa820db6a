"""A model as one folder: written, moved, opened again, put on a hub and fetched from it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from data.numbered import encode_numbered
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

import re2tal
from re2tal.backbones import BackboneConfig
from re2tal.cli import main
from re2tal.config import DataConfig, RunConfig, build_detector, load_config, save_config
from re2tal.data.streaming.stream import ClipConfig
from re2tal.data.streaming.windows import Slide
from re2tal.evaluation.suppression import SuppressionConfig
from re2tal.localizers.pyramid.actionformer import ActionFormerConfig
from re2tal.rewire import wiring_of
from re2tal.runs.model_folder import describe, describe_trained
from re2tal.runs.model_folder_card import Origin, model_card
from re2tal.training.export import write_model

CLASSES = ("jump", "run `fast`\n---")
FILES = ["README.md", "config.json", "model.json", "model.safetensors"]
SUMMARY = {"average_map": 0.25, "map": {"0.5": 0.3, "0.7": 0.2}, "protocol": "official", "subset": "test", "videos": 7}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that has ended."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = RunConfig(
        name="tiny",
        num_steps=8,
        data=DataConfig(
            shards=tmp_path / "shards",
            clips=ClipConfig(windowing=Slide(num_frames=16, frames_per_second=8.0), size=32, fit="stretch"),
        ),
        backbone=BackboneConfig(name="swin3d_nano"),
        localizer=ActionFormerConfig(
            channels=16, num_embedding_convs=1, num_stem_blocks=1, max_num_steps=8, regression_ranges=((0, 4), (4, 99))
        ),
        suppression=SuppressionConfig(max_per_video=5),
    )
    torch.manual_seed(0)
    network = build_detector(config, CLASSES)
    write_model(folder / "model.safetensors", network.state_dict(), classes=CLASSES, wiring=wiring_of(network))
    save_config(folder / "config.json", config)
    card = model_card(config, CLASSES, Origin("Trained on nothing.", "own", SUMMARY, "mit"))
    describe(folder, config, CLASSES, card=card)
    (folder / "metrics.jsonl").write_text("")
    return folder


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "party.mp4"
    path.write_bytes(encode_numbered(75, fps=25))
    return path


class Hub:
    """A hub that is a folder: takes the files that match, and gives them back."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> SimpleNamespace:
        assert exist_ok
        if not name.startswith("me/"):
            raise HfHubHTTPError("403 Forbidden: not yours\nmore", response=SimpleNamespace(headers={}, request=None))
        (self.root / name).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message, allow_patterns) -> SimpleNamespace:
        for path in Path(folder_path).iterdir():
            if path.name in allow_patterns:
                shutil.copy(path, self.root / repo_id)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/{revision or 'main'}: {commit_message}")

    def fetch(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        if not (self.root / name).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nmore")
        fetched = self.root / "cache" / name
        fetched.mkdir(parents=True, exist_ok=True)
        for path in (self.root / name).iterdir():
            if path.name in allow_patterns:
                shutil.copy(path, fetched)
        return str(fetched)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: made)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.fetch)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return made


def test_a_saved_model_finds_the_same_and_names_no_place_of_this_machine(run: Path, video: Path, tmp_path: Path):
    detector = re2tal.load_detector(run, device="cpu")
    detector.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == FILES
    again = re2tal.Detector.from_pretrained(tmp_path / "model", device="cpu")
    assert again.detect(video) == detector.detect(video) != []
    assert again.classes == CLASSES
    for name in ("config.json", "model.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / "model" / name).read_text()
    assert (tmp_path / "model" / "README.md").read_text() == (run / "README.md").read_text()
    with pytest.raises(ValueError, match="run is the folder of a training run"):
        detector.save_pretrained(run)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("# Mine")
    with pytest.raises(ValueError, match="is there already, and is no model card"):
        detector.save_pretrained(tmp_path / "other")
    assert (tmp_path / "other" / "README.md").read_text() == "# Mine"


def test_the_command_exports_a_model_folder(run: Path, video: Path, tmp_path: Path, capsys):
    arguments = ["export", "--run", str(run), "--to", "re2tal", "--out", str(tmp_path / "model")]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert "a model folder, for re2tal detect VIDEOS --model" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == FILES
    weights, other = load_file(run / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert weights.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in weights.items())
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


def test_the_card_has_a_head_that_the_hub_reads_and_the_measured_figures(run: Path):
    text = (run / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    document = yaml.safe_load(head)
    assert (document["library_name"], document["license"]) == ("re2tal", "mit")
    (result,) = document["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 25.0
    assert "protocol official" in result["metrics"][0]["name"]
    assert result["dataset"]["split"] == "test"
    assert "| 30.00 | 20.00 | 25.00 |" in body
    assert "7 videos of `test`" in body
    assert "`run ?fast??---`" in body  # a class name cannot end the code, nor the head


def test_a_model_goes_to_the_hub_and_comes_back(run: Path, video: Path, hub: Hub):
    detector = re2tal.load_detector(run, device="cpu")
    assert detector.push_to_hub("me/tiny", message="First") == "https://hub/me/tiny/main: First"
    assert sorted(path.name for path in (hub.root / "me" / "tiny").iterdir()) == FILES
    (hub.root / "me" / "tiny" / "evil.pt").write_bytes(b"never fetched")
    assert re2tal.load_detector("me/tiny", device="cpu").detect(video) == detector.detect(video)
    assert not (hub.root / "cache" / "me" / "tiny" / "evil.pt").exists()
    with pytest.raises(ValueError, match=r"^you/tiny cannot be put on the hub: 403 Forbidden: not yours; log in"):
        detector.push_to_hub("you/tiny")


def test_detections_with_a_model_of_the_hub_are_written_here(run: Path, video: Path, hub: Hub):
    re2tal.load_detector(run, device="cpu").push_to_hub("me/tiny")
    with pytest.raises(SystemExit) as end:
        main(["detect", str(video), "--model", "me/tiny", "--device", "cpu"])
    assert end.value.code == 0
    assert Path("detections.json").is_file()
    assert not (hub.root / "cache" / "me" / "tiny" / "detections.json").exists()


def test_a_model_that_is_not_there(hub: Hub):
    with pytest.raises(ValueError, match=r"^you/none is no folder here, and cannot be fetched: no connection; check"):
        re2tal.load_detector("you/none")
    Path("runs").mkdir()  # a misspelt run is never looked for on the hub
    with pytest.raises(FileNotFoundError, match=r"runs/mime/config\.json is not a file"):
        re2tal.load_detector("runs/mime")
    (hub.root / "me" / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^me/empty on the hub has no config\.json, so it is no model of re2tal"):
        re2tal.load_detector("me/empty")


def test_another_version_is_refused_before_anything_else_is_read(run: Path):
    facts = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(facts | {"layout": 2, "re2tal": "9.1"}))
    (run / "config.json").write_text('{"of": "the future"}')
    with pytest.raises(
        ValueError, match=r"model\.json has layout 2, written by re2tal 9\.1; this is re2tal .* layout 1"
    ):
        re2tal.load_detector(run)
    (run / "model.json").write_text("[]")
    with pytest.raises(ValueError, match=r"has layout None, written by re2tal an unknown version"):
        re2tal.load_detector(run)


def test_files_that_do_not_belong_together_are_refused(run: Path):
    config = load_config(run / "config.json")
    clips = replace(config.data.clips, size=48)
    save_config(run / "config.json", replace(config, data=replace(config.data, clips=clips)))
    with pytest.raises(ValueError, match=r"model\.json and config\.json do not agree on the preprocessing"):
        re2tal.load_detector(run)
    save_config(run / "config.json", config)
    facts = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(facts | {"classes": ["run", "jump"]}))
    with pytest.raises(ValueError, match=r"model\.json and model\.safetensors do not agree on the classes"):
        re2tal.load_detector(run)
    (run / "model.json").unlink()  # as of earlier runs
    assert re2tal.load_detector(run, device="cpu").classes == CLASSES


def test_a_pickle_under_the_name_of_weights_is_not_read(run: Path):
    torch.save({"weight": torch.zeros(1)}, run / "model.safetensors")
    with pytest.raises(ValueError, match=r"is not a safetensors file"):
        re2tal.load_detector(run)
    save_file({"weight": torch.zeros(1)}, run / "model.safetensors")
    with pytest.raises(ValueError, match=r"is not a trained re2tal model"):
        re2tal.load_detector(run)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "the backbone began with random weights"),
        ({"backbone": BackboneConfig(weights="/from/k400.pth")}, "the backbone began with weights `k400.pth`"),
        ({"start_from": Path("/home/me/runs/before")}, "it began with the model `runs/before`"),
        ({"backbone": BackboneConfig(name="features", feature_channels=8, rewired=False)}, "it began with random"),
    ],
)
def test_the_card_of_a_run_says_what_it_began_with(changes: dict, said: str, tmp_path: Path) -> None:
    shards = SimpleNamespace(videos=["a", "b"], manifest=SimpleNamespace(dataset="own"))
    summary = {**SUMMARY, "steps": 8, "ranks": 2, "train_seconds": 3.0}
    describe_trained(tmp_path, replace(RunConfig(), **changes), CLASSES, summary=summary, training=shards)
    card = (tmp_path / "README.md").read_text()
    assert f"with 2 ranks, in 3 s; {said}" in card
    assert "/home/me" not in card
