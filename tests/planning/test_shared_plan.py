"""Two ranks train under DeepSpeed with the one plan that rank 0 makes, and learn what they learn without it."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.ranks import run_ranks
from planning.scripted_run import ScriptedRun
from planning.small import small_run
from torch.utils._pytree import tree_leaves

from re2tal.config import build_detector
from re2tal.distributed import resolve_world
from re2tal.planning import choice, shared
from re2tal.planning.shared import save_plan, shared_plan
from re2tal.planning.step_plan import StepPlan
from re2tal.training.engine import build_engine
from re2tal.training.optimizer import build_optimizer
from re2tal.training.process_group import join
from re2tal.training.zero_file import resolve_deepspeed_config

NUM_CLASSES = 4


def train_with_and_without(ds: str) -> dict[str, Any]:
    """What each rank planned for half of the memory, and its weights after a step with that plan and without one."""
    world, run = resolve_world(os.environ), small_run()
    device = join(world, run.engine)

    def planned(budget_gb: float | None) -> StepPlan:
        of = {"world_size": world.world_size, "num_classes": NUM_CLASSES, "device": device}
        return shared_plan(small_run(memory_budget_gb=budget_gb), Path(ds), **of)

    generous = planned(10.0)
    half = planned(0.5 * generous.memory.peak / 1e9)
    with pytest.raises(ValueError, match="no plan of this step needs less than") as refusal:
        planned(0.0001)
    return {
        "settings": {name: asdict(setting) for name, setting in half.settings.items()},
        "share": half.memory.peak / generous.memory.peak,
        "refusal": str(refusal.value),
        "planned": _weights_after_a_step(ds, half),
        "unplanned": _weights_after_a_step(ds, None),
    }


def fail_while_planning(ds: str) -> dict[str, Any]:
    """How each rank ends, and after how long, when rank 0 fails while it times what stages may do."""
    world, run = resolve_world(os.environ), small_run(memory_budget_gb=1.0)
    device = join(world, run.engine)
    choice.DryRun = ScriptedRun  # type: ignore[misc, assignment]
    begin, ended = time.monotonic(), []
    for error in (torch.OutOfMemoryError("too much"), ValueError("too little")):

        def fails(*_: Any, error: Exception = error, **__: Any) -> Any:
            raise error

        choice.measured_seconds = fails
        with pytest.raises((torch.OutOfMemoryError, RuntimeError, ValueError)) as end:
            shared_plan(run, Path(ds), world_size=world.world_size, num_classes=NUM_CLASSES, device=device)
        ended.append(repr(end.value))
    return {"ended": ended, "seconds": time.monotonic() - begin}


def test_an_error_of_rank_0_while_it_plans_ends_all_ranks(tmp_path) -> None:
    (tmp_path / "ds.json").write_text("{}")
    first, second = run_ranks(fail_while_planning, world_size=2, timeout_seconds=100, ds=str(tmp_path / "ds.json"))
    assert first["ended"] == ["OutOfMemoryError('too much')", "ValueError('too little')"]
    assert second["ended"] == [
        "RuntimeError('rank 0 failed, and all ranks end with it: OutOfMemoryError: too much')",
        "ValueError('too little')",
    ]
    assert max(first["seconds"], second["seconds"]) < 60


def test_what_a_plan_was_not_made_for_is_planned_anew_and_said(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(choice, "DryRun", ScriptedRun)
    monkeypatch.setattr(choice, "measured_seconds", lambda run, settings, **_: [[1.0] * 3] * len(settings))
    ds, path = tmp_path / "ds.json", tmp_path / "plan.json"
    ds.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}')

    def said(*, world_size: int = 1, num_classes: int = 4, **engine) -> str:
        run = small_run(**{"memory_budget_gb": 1.0, **engine})
        of = {"world_size": world_size, "num_classes": num_classes, "device": torch.device("cpu"), "earlier": path}
        save_plan(path, shared_plan(run, ds, **of))
        return capsys.readouterr().err.strip()

    assert said() == f"planning anew: there is no {path}"
    assert said() == f"the stages of the backbone run as in {path}"
    assert said(timeout_minutes=1.0) == f"the stages of the backbone run as in {path}"
    assert said(precision="bf16") == f"planning anew: engine.precision is 'bf16', in {path} it is 'fp32'"
    assert said(world_size=2) == (
        f"planning anew: engine.precision is 'fp32', in {path} it is 'bf16'; number of ranks is 2, in {path} it is 1"
    )
    ds.write_text('{"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}')
    assert said(world_size=2) == f"planning anew: zero_optimization.stage is 1, in {path} it is 2"
    path.write_text("{}")
    assert said(world_size=2) == f"planning anew: {path} is not a plan of format 1"
    path.write_text('{"format": 1, "budget": 3}')
    assert said(world_size=2).startswith(f"planning anew: {path}: memory is ")
    path.write_text(path.read_text()[:100])
    assert said(world_size=2).startswith(f"planning anew: {path} is not usable JSON")


def test_a_plan_for_what_was_free_is_used_again_where_as_much_is_free(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(choice, "DryRun", ScriptedRun)
    seconds = {"stored": 1.0}
    monkeypatch.setattr(
        choice, "measured_seconds", lambda run, settings, **_: [[seconds.get(str(one), 2.0)] * 3 for one in settings]
    )
    ds, path = tmp_path / "ds.json", tmp_path / "plan.json"
    ds.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}')
    run, of = small_run(memory_budget_gb="auto"), {"world_size": 1, "num_classes": 4, "device": torch.device("cpu")}

    def said(free: int) -> tuple[str, int]:
        monkeypatch.setattr(shared, "free_on_all_ranks", lambda device: free)
        plan = shared_plan(run, ds, **of, earlier=path)
        save_plan(path, plan)
        return capsys.readouterr().err, plan.memory.peak

    first, peak = said(10**9)
    assert first == f"planning anew: there is no {path}\n"
    assert said(peak) == (f"the stages of the backbone run as in {path}\n", peak)
    again, lower = said(peak - 1)
    assert again.startswith(f"planning anew: the plan in {path} needs {peak / 1e9:.3f} GB, but only")
    assert lower < peak


def _weights_after_a_step(ds: str, plan: StepPlan | None) -> list[torch.Tensor]:
    run, rank = small_run(), int(os.environ["RANK"])
    torch.manual_seed(0)
    network = build_detector(run, [f"class {number}" for number in range(NUM_CLASSES)])
    if plan is not None:
        plan.apply(network)
    settings = resolve_deepspeed_config(Path(ds), run.engine, world_size=2)
    engine = build_engine(network, build_optimizer(network, run.optimizer), factor=lambda step: 1.0, settings=settings)
    frames = torch.randn(2, 3, 16, 48, 48, generator=torch.Generator().manual_seed(rank))
    outputs = engine(frames, torch.ones(2, 16, dtype=torch.bool))
    engine.backward(torch.stack([leaf.square().mean() for leaf in tree_leaves(outputs) if leaf.requires_grad]).sum())
    engine.step()
    return [parameter.detach().clone() for parameter in network.parameters()]


@pytest.mark.slow
def test_ranks_agree_and_learn_the_same_in_half_of_the_memory(tmp_path) -> None:
    ds = tmp_path / "ds.json"
    ds.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}))
    first, second = run_ranks(train_with_and_without, world_size=2, timeout_seconds=200, ds=str(ds))
    assert first["settings"] == second["settings"]
    assert first["refusal"] == second["refusal"]
    assert first["share"] <= 0.5
    assert any(setting["stored"] is not None for setting in first["settings"].values())
    for one in (first, second):
        # AdamW's first step is the sign of a gradient: those near 0 turn with the last digits.
        for planned, unplanned in zip(one["planned"], one["unplanned"], strict=True):
            assert (planned - unplanned).abs().mean() < 1e-5
    assert all(a.equal(b) for a, b in zip(first["planned"], second["planned"], strict=True))
