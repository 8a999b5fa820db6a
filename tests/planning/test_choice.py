"""Plans keep within their budget, are as fast as that allows, and say what they need where it does not."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planning.scripted_run import INSIDE, MEGABYTE, OTHER_BLOCKS, STATE, STORED_UNIT, ScriptedRun
from planning.small import small_run

from re2tal.backbones import BackboneConfig
from re2tal.config import build_detector
from re2tal.planning import calibration, choice
from re2tal.planning.calibration import link_bytes_per_second, measured_seconds
from re2tal.planning.choice import plan_step
from re2tal.planning.dry_run import Trace
from re2tal.planning.settings import Setting
from re2tal.planning.step_memory import CHUNK, STATES
from re2tal.planning.step_plan import StepPlan
from re2tal.planning.zero_memory import zero_memory
from re2tal.rewire import stages_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def ds(tmp_path) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}))
    return path


@pytest.fixture
def _by_hand(monkeypatch) -> None:
    """Bytes by rule; storing takes a second, rebuilding 1.3, 1.2 with all known or the other blocks kept, and small
    pieces take longer."""

    def seconds(run, settings, *, order, **_):
        assert any(one.keep_nonresidual for one in settings) == run.backbone.name.startswith("slowfast")
        costs = [
            1.0
            if one.stored is None
            else 1.3 - 0.1 * bool(one.known) - 0.1 * one.keep_nonresidual + 0.1 / (one.chunk_mebibytes or 100)
            for one in settings
        ]
        return [[cost] * len(order) for cost in costs]

    monkeypatch.setattr(choice, "measured_seconds", seconds)
    monkeypatch.setattr(choice, "DryRun", ScriptedRun)


def planned(ds: Path, budget_gb: float | None, name: str = "swin3d_nano") -> StepPlan:
    run = replace(small_run(memory_budget_gb=budget_gb), backbone=BackboneConfig(name=name))
    return plan_step(run, ds, world_size=1, num_classes=4, device=CPU)


@pytest.mark.usefixtures("_by_hand")
def test_the_budget_decides(ds) -> None:
    generous = planned(ds, 10.0)
    assert set(generous.settings.values()) == {Setting(None, None)}
    assert sum(one.planned for one in generous.seconds.values()) == 3.0
    last = 0.0
    for share in (1.0, 0.8, 0.6, 0.5, 0.4):
        tight = planned(ds, share * generous.memory.peak / 1e9)
        assert tight.memory.peak <= share * generous.memory.peak + 1
        seconds = sum(one.planned for one in tight.seconds.values())
        assert seconds >= last
        last = seconds
    assert last > 3.0
    assert "planned for" in str(tight)
    assert str(tight).startswith("swin3d_nano, 2 clips of 16 frames of 48 x 48 in fp32, ZeRO 2 on 1 rank, cpu\n")


@pytest.mark.usefixtures("_by_hand")
def test_branches_know_what_they_added_where_nothing_can_be_stored(ds) -> None:
    """What one added takes a state and saves 0.05 s; a stored unit takes three."""
    least = smallest_budget(ds)
    assert all(setting.known == 0 for setting in planned(ds, least).settings.values())
    more = planned(ds, least + 1.5 * STATE / 1e9)
    assert any(setting.known == 1 and setting.stored == 0 for setting in more.settings.values())
    assert sum(one.planned for one in more.seconds.values()) < sum(
        one.planned for one in planned(ds, least).seconds.values()
    )
    assert "1 output saved" in str(more)


@pytest.mark.usefixtures("_by_hand")
def test_blocks_that_are_not_residual_are_kept_where_that_is_the_best_use_of_the_room(ds) -> None:
    """Keeping them takes 25 MB and saves 0.1 s; to store the one unit of their stage as well takes another 10 MB."""
    name = "slowfast_nano"
    least = smallest_budget(ds, name)
    assert not any(setting.keep_nonresidual for setting in planned(ds, least, name).settings.values())
    more = planned(ds, least + (OTHER_BLOCKS + MEGABYTE) / 1e9, name)
    assert sum(setting.keep_nonresidual for setting in more.settings.values()) == 1
    assert "non-residual blocks kept" in str(more)
    assert more.memory.peak <= more.budget
    assert sum(one.planned for one in more.seconds.values()) < sum(
        one.planned for one in planned(ds, least, name).seconds.values()
    )
    network = build_detector(replace(small_run(), backbone=BackboneConfig(name=name)), ["a", "b"])
    more.apply(network)
    assert {path for path, stage in stages_of(network.backbone).items() if stage.config.keep_nonresidual} == {
        path for path, setting in more.settings.items() if setting.keep_nonresidual
    }


def smallest_budget(ds: Path, name: str = "swin3d_nano") -> float:
    with pytest.raises(ValueError, match="no plan of this step needs less than") as error:
        planned(ds, 0.001, name)
    return float(str(error.value).split("less than ")[1].split(" ")[0])


@pytest.mark.usefixtures("_by_hand")
def test_a_plan_sets_the_stages_of_a_network(ds) -> None:
    half = planned(ds, 0.5 * planned(ds, 10.0).memory.peak / 1e9)
    network = build_detector(small_run(), ["a", "b"])
    half.apply(network)
    for name, stage in stages_of(network.backbone).items():
        setting = half.settings[name]
        assert stage.config.recompute == (setting.stored is not None)
        assert (stage.config.stored, stage.config.chunk_mebibytes) == (setting.stored or 0, setting.chunk_mebibytes)


@pytest.mark.usefixtures("_by_hand")
def test_a_budget_below_the_smallest_plan_is_refused_with_what_that_needs(ds) -> None:
    with pytest.raises(
        ValueError, match=r"allows 0.001 GB, but no plan of this step needs less than 0\.\d+ GB"
    ) as error:
        planned(ds, 0.001)
    assert "most of them" in str(error.value)
    least = float(str(error.value).split("less than ")[1].split(" ")[0])
    assert planned(ds, least).memory.peak <= least * 1e9


@pytest.mark.usefixtures("_by_hand")
def test_nothing_is_timed_for_a_budget_that_is_refused(ds, monkeypatch) -> None:
    least, timed = smallest_budget(ds), []

    def seconds(run, settings, *, order, **_):
        timed.append(settings)
        return [[1.0] * len(order) for _ in settings]

    monkeypatch.setattr(choice, "measured_seconds", seconds)
    monkeypatch.setattr(choice, "link_bytes_per_second", lambda device: timed.append(device))
    with pytest.raises(ValueError, match=rf"no plan of this step needs less than {least} GB, most of them states"):
        planned(ds, least - 0.001)
    assert timed == []
    assert planned(ds, least).memory.peak <= least * 1e9
    assert timed != []


@pytest.mark.usefixtures("_by_hand")
@pytest.mark.parametrize("excess", [0, 10**9])
def test_what_is_possible_is_not_refused_for_an_estimate(ds, monkeypatch, excess) -> None:
    """Stages set differently may need more than their options say: the plan is then one in which they are alike."""
    enough = smallest_budget(ds) + 1.5 * STATE / 1e9

    class Mixed(ScriptedRun):
        def trace(self) -> Trace:
            trace = super().trace()
            alike = len({stage.config for stage in self.stages().values()}) == 1
            more = 0 if alike else excess
            return replace(trace, phases=tuple(replace(phase, peak=phase.peak + more) for phase in trace.phases))

    monkeypatch.setattr(choice, "DryRun", Mixed)
    plan = planned(ds, enough)
    assert plan.memory.peak <= enough * 1e9
    assert (len(set(plan.settings.values())) == 1) == (excess > 0)
    assert sum(one.planned for one in plan.seconds.values()) > 3.0


@pytest.mark.usefixtures("_by_hand")
def test_a_budget_that_only_the_optimizer_exceeds_is_refused_too(ds, monkeypatch) -> None:
    enough = planned(ds, 10.0)
    monkeypatch.setattr(
        choice, "zero_memory", lambda *args, **options: replace(zero_memory(*args, **options), step_scratch=10**10)
    )
    with pytest.raises(ValueError, match=r"no plan of this step needs less than 1\d\.\d+ GB"):
        planned(ds, 2 * enough.memory.peak / 1e9)


@pytest.mark.usefixtures("_by_hand")
def test_without_a_budget_nothing_is_planned_and_parts_add_up_to_the_peak(ds) -> None:
    plan = planned(ds, None)
    assert plan.settings == {}
    assert sum(plan.memory.parts.values()) == plan.memory.peak
    assert plan.memory.parts[STATES] == plan.memory.most[STATES] == 3 * 2 * STATE
    assert plan.memory.parts[CHUNK] == plan.memory.most[CHUNK] == INSIDE > STORED_UNIT
    assert "localizer" not in plan.memory.parts
    assert plan.memory.most["localizer"] == MEGABYTE
    assert re.search(rf"{CHUNK} +64\.00 MB +64\.00 MB", str(plan))
    assert re.search(r"localizer +1\.00 MB +-", str(plan))


@pytest.mark.usefixtures("_by_hand")
def test_a_plan_is_the_same_after_its_json(ds) -> None:
    half = planned(ds, 0.5 * planned(ds, 10.0).memory.peak / 1e9)
    assert StepPlan.from_json(json.loads(json.dumps(half.to_json()))) == half
    assert half.to_json()["peak"] == half.memory.peak
    older = json.loads(json.dumps(half.to_json()))
    for setting in older["settings"].values():
        del setting["keep_nonresidual"]
    assert StepPlan.from_json(older) == half
    with pytest.raises(ValueError, match=r"memory.host is 'much': Input should be a valid integer"):
        StepPlan.from_json({**half.to_json(), "memory": {**half.to_json()["memory"], "host": "much"}})
    with pytest.raises(ValueError, match=r"the plan is for stages .* but this backbone has"):
        replace(half, settings={"elsewhere": Setting(0, None)}).apply(build_detector(small_run(), ["a", "b"]))


@pytest.mark.parametrize(("gigabytes_per_second", "chosen"), [(1000.0, True), (0.01, False)])
@pytest.mark.usefixtures("_by_hand")
def test_states_wait_on_the_host_where_the_link_hides_it(ds, monkeypatch, gigabytes_per_second, chosen) -> None:
    """Stages take a second, their states of 20 MB go there and back in 0.04 ms or in 4 s."""
    monkeypatch.setattr(choice, "link_bytes_per_second", lambda device: gigabytes_per_second * 1e9)
    monkeypatch.setattr(choice, "_name", lambda device: "a card")
    run = small_run(memory_budget_gb=planned(ds, None).memory.peak / 1e9 - 0.04)
    plan = plan_step(run, ds, world_size=1, num_classes=4, device=CUDA)
    assert any(setting.offload for setting in plan.settings.values()) == chosen
    assert ("states on the host" in str(plan)) == chosen
    assert plan.memory.peak <= run.engine.memory_budget_gb * 1e9
    assert plan.memory.host == sum(2 * STATE for setting in plan.settings.values() if setting.offload)
    network = build_detector(run, ["a", "b"])
    plan.apply(network)
    assert [stage.config.offload for stage in stages_of(network.backbone).values()] == [
        setting.offload for setting in plan.settings.values()
    ]


@pytest.mark.usefixtures("_by_hand")
def test_the_smallest_budget_there_is_counts_on_the_host(ds, monkeypatch) -> None:
    def least(device: torch.device) -> float:
        with pytest.raises(ValueError, match="no plan of this step needs less than") as error:
            plan_step(small_run(memory_budget_gb=0.001), ds, world_size=1, num_classes=4, device=device)
        return float(str(error.value).split("less than ")[1].split(" ")[0])

    monkeypatch.setattr(choice, "_name", lambda device: "a card")
    on_a_cpu = least(CPU)  # where the host is the device
    monkeypatch.setattr(choice, "link_bytes_per_second", lambda device: 1e9)
    assert least(CUDA) < on_a_cpu - 0.01


def test_nothing_waits_on_the_host_of_a_cpu() -> None:
    assert link_bytes_per_second(CPU) is None


def test_seconds_are_measured_for_every_stage_and_leave_the_generators_alone() -> None:
    run, before = small_run(), torch.get_rng_state()
    order = list(stages_of(build_detector(run, ["a", "b"]).backbone))
    torch.set_rng_state(before)
    settings = [Setting(None, None), Setting(0, None)]
    found = measured_seconds(run, settings, device=CPU, plain_bytes=10**6, inside_bytes=10**6, order=order)
    assert [len(seconds) for seconds in found] == [3, 3]
    assert all(second > 0 for seconds in found for second in seconds)
    assert torch.equal(torch.get_rng_state(), before)


def test_pieces_larger_than_a_shortened_clip_are_not_timed_again(monkeypatch) -> None:
    """What is inside of a branch is 4 MB on the clips of the run, and 1 MB on a quarter of one of them."""
    timed: list[Setting] = []

    def seconds(backbone, setting, frames, order):
        timed.append(setting)
        return [float(setting.chunk_mebibytes or 0)] * len(order)

    monkeypatch.setattr(calibration, "_seconds", seconds)
    monkeypatch.setattr(calibration, "MOST_BYTES_ON_A_CPU", 10**6)
    run = small_run()
    clips = replace(run.data.clips, windowing=replace(run.data.clips.windowing, num_frames=32))
    settings = [Setting(0, pieces, known) for pieces in (None, 2.0, 1.0) for known in (0, 1)]
    found = measured_seconds(
        replace(run, data=replace(run.data, clips=clips)),
        settings,
        device=CPU,
        plain_bytes=4 * 10**6,
        inside_bytes=4 * 10**6,
        order=["only"],
    )
    whole = [Setting(0, None, 0), Setting(0, None, 1)]
    assert timed == 3 * [*whole, Setting(0, 1.0, 0), Setting(0, 1.0, 1)]
    assert found == [[0.0]] * 4 + [[4.0]] * 2  # scaled to all frames


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewired": False}, "the backbone is not rewired, so nothing can be rebuilt"),
        ({"frozen": True}, "a frozen backbone keeps nothing"),
        ({"states": "int32"}, "stages with backbone.states 'int32' cannot keep their activations"),
    ],
)
def test_what_no_plan_can_hold_is_refused(change, message, ds) -> None:
    run = small_run(memory_budget_gb=1.0)
    run = replace(run, backbone=replace(run.backbone, **change))
    with pytest.raises(ValueError, match=message):
        plan_step(run, ds, world_size=1, num_classes=4, device=CPU)


def test_a_run_on_stored_features_is_counted_and_takes_no_budget(ds) -> None:
    run = small_run()
    features = replace(run, backbone=BackboneConfig(name="features", feature_channels=8, rewired=False))
    plan = plan_step(features, ds, world_size=1, num_classes=4, device=CPU)
    assert "features, 2 clips of 16 steps of 8 channels in fp32" in str(plan)
    assert plan.memory.most["batch"] == 4 * 2 * 8 * 16
    parameters = sum(parameter.numel() for parameter in build_detector(features, list("abcd")).parameters())
    assert plan.memory.most["parameters"] == 4 * parameters
    assert plan.memory.peak > 4 * 4 * parameters
    within = replace(features, engine=replace(run.engine, memory_budget_gb=1.0))
    with pytest.raises(ValueError, match="a run on stored features has no backbone that could be rebuilt"):
        plan_step(within, ds, world_size=1, num_classes=4, device=CPU)


@pytest.mark.parametrize("budget", [-1, float("inf")])
def test_a_budget_must_be_positive_and_finite(budget) -> None:
    with pytest.raises(ValueError, match=f"memory_budget_gb is {budget}; give a positive number of gigabytes"):
        small_run(memory_budget_gb=budget)
