"""DeepSpeed files by name, wherever the package is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from re2tal.runs.deepspeed_presets import DEFAULT_PRESET, FOLDER, find_preset, presets

SHIPPED = Path(__file__).parents[2] / "ds_configs"


def test_the_package_holds_the_files_of_the_repository():
    assert presets() == sorted(path.stem for path in SHIPPED.glob("*.json"))
    for path in SHIPPED.glob("*.json"):
        assert (FOLDER / path.name).read_bytes() == path.read_bytes(), f"copy {path.name} to {FOLDER}"


def test_a_name_a_path_or_a_list_of_the_names(tmp_path, monkeypatch):
    assert find_preset(DEFAULT_PRESET) == FOLDER / "zero2.json"
    assert find_preset("ds_configs/zero3.json") == Path("ds_configs/zero3.json")
    assert find_preset("own.json") == Path("own.json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").write_text("{}")
    assert find_preset("own") == Path("own")
    with pytest.raises(ValueError, match=r"zero4 is neither a preset nor a DeepSpeed file; presets are zero1, zero2"):
        find_preset("zero4")
