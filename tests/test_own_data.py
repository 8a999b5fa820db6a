"""Every command of docs/own_data.md, run as the page has it, on the sample videos; and what the page and they say."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
from distributed.commands import re2tal as re2tal_command

import re2tal
from re2tal.cli import COMMANDS
from re2tal.evaluation.results import read_results
from re2tal.runs.detection import DetectionOptions, detect
from re2tal.runs.model_folder import FILES, SHIPPED

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/own_data.md").read_text()
SHORTER = {"train": ("--training.epochs", "1", "--schedule.warmup-epochs", "0.5")}
"""What the test adds to a command, to be done in seconds."""


def commands() -> list[list[str]]:
    """The lines of the page's shell blocks, in order."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.strip()]


def test_the_page_becomes_a_detector(tmp_path: Path) -> None:
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    lines = commands()
    assert [line[1] for line in lines] == [
        *("detect", "annotations", "doctor", "init", "shards", "train", "detect", "evaluate", "report", "shards"),
    ]
    said = "".join(
        stream for _, *line in lines for stream in re2tal_command(*line, *SHORTER.get(line[0], ()), cwd=tmp_path)
    )
    assert "no --model: taking the small one that comes with the package" in said
    assert set(read_results(tmp_path / "first.json").predictions) == {"S3_Fall_01", "S3_ADL_18"}
    assert set(FILES) <= {path.name for path in (tmp_path / "runs/mine").iterdir()}
    assert "13 videos of subset `training`" in (tmp_path / "runs/mine/README.md").read_text()
    # What `init` says to run next is what the page says.
    for line in ("shards build", "train --config"):
        (given,) = [shlex.join(one) for one in commands() if line in shlex.join(one)]
        assert given.replace("runs/mine", "runs/recipe") in said


def test_commands_in_the_text_exist() -> None:
    named = set(re.findall(r"`re2tal ([a-z-]+)", PAGE))
    assert named <= set(COMMANDS)
    assert {"init", "detect", "shards", "export"} <= named


def test_the_samples_are_what_their_page_says() -> None:
    database = json.loads((ROOT / "samples/annotations.json").read_text())["database"]
    assert set(database) == {path.stem for path in (ROOT / "samples").glob("*.mp4")}
    said = (ROOT / "samples/README.md").read_text()
    counts = Counter(action["label"] for entry in database.values() for action in entry["annotations"])
    for name in ("falling", "standing", "walking", "sitting", "eating", "reading"):
        assert f"`{name}` {counts[name]}" in said
    assert f"{len(database)} videos" in said
    assert f"with {counts.total()} actions of {len(counts)} classes" in said
    assert all((entry["subset"] == "validation") == name.startswith("S3_") for name, entry in database.items())


def test_the_shipped_model_reaches_what_its_card_says(tmp_path: Path) -> None:
    """From the video files, as a user would; another processor may round otherwise."""
    assert {path.name for path in SHIPPED.iterdir()} == set(FILES)
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 1.5e6
    videos = sorted((ROOT / "samples").glob("S3_*.mp4"))
    detect(SHIPPED, videos, wanted=DetectionOptions(out=tmp_path / "found.json"), device="cpu")
    reached = re2tal.evaluate(tmp_path / "found.json", ROOT / "samples/annotations.json")
    said = re.search(r"\| ([\d. |]+) \|\n\n## Use", (SHIPPED / "README.md").read_text())
    assert said is not None
    *by_tiou, average = (float(figure) for figure in said[1].split(" | "))
    assert 100 * reached.average_map == pytest.approx(average, abs=2.0)
    assert [100 * one for one in reached.precision.map_by_tiou.values()] == pytest.approx(by_tiou, abs=5.0)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.json", "README.md"])
def test_the_shipped_model_is_package_data(name: str) -> None:
    assert files("re2tal").joinpath("models", SHIPPED.name, name).is_file()
