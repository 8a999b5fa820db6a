"""A build of torch for CUDA on a machine without a GPU: every command takes the CPU."""

from __future__ import annotations

import pytest
import torch

from re2tal.cli import main


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
