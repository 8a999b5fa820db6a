"""A build of torch for CUDA on a machine without a GPU: every command takes the CPU."""

from __future__ import annotations

import pytest
import torch

from re2tal.cli import main
from re2tal.runs.devices import named_device


@pytest.mark.parametrize("command", [["plan", "--recipe", "demo"], ["recipes", "demo", "--memory"]])
def test_a_build_for_cuda_without_a_gpu_plans_for_the_cpu(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def named(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", named)
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    assert "cpu" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "cpu:x"])
def test_a_device_that_cannot_be_had_is_named_with_what_can(name: str) -> None:
    with pytest.raises(ValueError, match=rf"device is '{name}', which cannot be had here \(.*give cpu, cuda"):
        named_device(name)
    assert named_device("cpu") == torch.device("cpu")
