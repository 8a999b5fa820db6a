"""`re2tal plan` prints memory by part and writes it in bytes."""

from __future__ import annotations

import json

import pytest
from planning.scripted_run import ScriptedRun

from re2tal.cli import main
from re2tal.planning import choice


def test_parts_are_printed_and_written(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(choice, "DryRun", ScriptedRun)
    with pytest.raises(SystemExit) as end:
        main(["plan", "--recipe", "demo", "--ranks", "2", "--device", "cpu", "--json", str(tmp_path / "plan.json")])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for part in (
        "parameters",
        "optimizer",
        "moving average",
        "communication",
        "batch",
        "gradients",
        "states",
        "chunk",
        "localizer",
    ):
        assert part in printed
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["budget"] is None
    assert sum(written["memory"]["parts"].values()) == written["peak"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "0"], "--ranks is 0; give 1 or more"),
        (["--classes", "0"], "--classes is 0; give 1 or more"),
        (["--memory-budget-gb", "-2"], "memory_budget_gb is -2.0; give a positive number"),
        (["--device", "cuda"], "device is 'cuda', which cannot be had here"),
    ],
)
def test_wrong_input_is_one_line_and_exit_status_2(capsys, monkeypatch, arguments, message) -> None:
    monkeypatch.setattr(choice, "DryRun", ScriptedRun)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        main(["plan", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
