"""What "auto" comes to on a CPU: what the system calls available, within the limits of control groups."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from planning.scripted_run import ScriptedRun
from planning.small import small_run

from re2tal.planning import choice, free_memory
from re2tal.planning.choice import plan_step

CPU = torch.device("cpu")


@pytest.fixture
def system(tmp_path, monkeypatch) -> Path:
    """A folder in the place of /proc and /sys, of a machine with a gibibyte available and no control groups."""
    (tmp_path / "meminfo").write_text("MemTotal:   4194304 kB\nMemAvailable:   1048576 kB\n")
    (tmp_path / "own").write_text("0::/\n")
    for name, place in {"AVAILABLE": "meminfo", "OWN_GROUP": "own", "GROUPS": "groups"}.items():
        monkeypatch.setattr(free_memory, name, tmp_path / place)
    return tmp_path


def limit(group: Path, *, most: str, used: int, cached: int) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 7\ninactive_file {cached}\n")


def test_most_of_what_is_available_is_taken_by_all_ranks_together(system) -> None:
    assert free_memory.free_memory(CPU) == int(0.7 * 2**30)
    assert free_memory.free_memory(CPU, sharers=4) == int(0.7 * 2**30) // 4
    assert free_memory.free_on_all_ranks(CPU) == int(0.7 * 2**30)


def test_a_kernel_without_control_groups_has_no_limits(system) -> None:
    (system / "own").unlink()
    assert free_memory.free_memory(CPU) == int(0.7 * 2**30)


def test_a_control_group_and_those_around_it_leave_less(system) -> None:
    (system / "own").write_text("3:cpu:/elsewhere\n0::/job/step\n")
    limit(system / "groups" / "job" / "step", most="max", used=0, cached=0)
    assert free_memory.free_memory(CPU) == int(0.7 * 2**30)
    limit(system / "groups" / "job", most="500000000", used=300000000, cached=100000000)
    assert free_memory.free_memory(CPU) == int(0.7 * 300000000)
    limit(system / "groups" / "job" / "step", most="100", used=200, cached=0)
    assert free_memory.free_memory(CPU) == 0


@pytest.mark.parametrize("place", ["job/step", "job", "."])
def test_a_control_group_of_version_1_leaves_less_too(system, place: str) -> None:
    # A container sees its own group at the root, and may be told its name on the host.
    (system / "own").write_text("12:cpu,cpuacct:/elsewhere\n5:memory:/job/step\n1:name=systemd:/x:y\n0::/\n")
    (group := system / "groups" / "memory" / place).mkdir(parents=True)
    (group / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 100000000\n")
    (group / "memory.usage_in_bytes").write_text("300000000\n")
    (group / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # none
    assert free_memory.free_memory(CPU) == int(0.7 * 2**30)
    (group / "memory.limit_in_bytes").write_text("500000000\n")
    assert free_memory.free_memory(CPU) == int(0.7 * 300000000)


def test_a_system_that_does_not_say_is_told_to_be_given_a_number(system) -> None:
    (system / "meminfo").write_text("MemTotal: 12 kB\n")
    with pytest.raises(ValueError, match=r"does not say how much memory is available here .*; give a number"):
        free_memory.free_memory(CPU)


def test_a_card_gives_what_it_has_free(monkeypatch) -> None:
    card = SimpleNamespace(mem_get_info=lambda device: (10**9, 8 * 10**9))
    monkeypatch.setattr(torch, "get_device_module", lambda device: card)
    assert free_memory.free_memory(torch.device("cuda"), sharers=8) == int(0.92 * 10**9)


def test_auto_is_refused_with_what_is_free_where_that_is_too_little(system, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(choice, "DryRun", ScriptedRun)
    monkeypatch.setattr(choice, "measured_seconds", lambda run, settings, **_: [[1.0] * 3] * len(settings))
    (system / "meminfo").write_text("MemAvailable: 100 kB\n")
    (tmp_path / "ds.json").write_text("{}")
    with pytest.raises(ValueError, match=r"allows 0\.000 GB, but no plan of this step needs less than 0\.081"):
        plan_step(small_run(memory_budget_gb="auto"), tmp_path / "ds.json", world_size=1, num_classes=4, device=CPU)
