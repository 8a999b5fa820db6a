"""Forms of a backbone side by side, long videos in groups of clips, and the page that lists them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planning.small import small_run

from re2tal.backbones import BackboneConfig
from re2tal.cli import main
from re2tal.config import RunConfig, save_config
from re2tal.data.streaming.windows import Slide
from re2tal.planning.choice import plan_step
from re2tal.planning.dry_run import DryRun
from re2tal.planning.forms import FORMS, in_form, memory_on_ranks
from re2tal.recipes import find_recipe
from re2tal.runs import planning_tables
from re2tal.runs.deepspeed_presets import find_preset
from re2tal.runs.planning_tables import BEGIN, END, write_page

CPU = torch.device("cpu")


def transformer_run(num_frames: int = 64, **backbone) -> RunConfig:
    """A nano VideoMAE on one window of clips of four frames."""
    run = small_run()
    clips = replace(run.data.clips, windowing=Slide(num_frames=num_frames, frames_per_second=8.0), size=48)
    return replace(
        run,
        data=replace(run.data, clips=clips),
        backbone=BackboneConfig(name="videomae_nano", **backbone),
        engine=replace(run.engine, batch_size=1),
    )


def activation_peak(run: RunConfig) -> int:
    return DryRun(run, device=CPU, num_classes=4, free_gradients=True).trace().peak


def peaks(run: RunConfig, ranks=(1, 8)) -> list[int]:
    found = memory_on_ranks(run, find_preset("zero3"), ranks=ranks, num_classes=4, device=CPU)
    return [memory.peak for memory in found]


def test_forms_differ_as_they_say() -> None:
    run = transformer_run(chunk_mebibytes=2.0, drop_path=0.1)
    forms = {form: in_form(run, form) for form in FORMS}
    assert not forms["plain"].backbone.rewired
    assert (forms["checkpoint"].backbone.unit, forms["checkpoint"].backbone.beta) == ("block", 0.0)
    assert (forms["rewired"].backbone.unit, forms["rewired"].backbone.chunk_mebibytes) == ("branch", 2.0)
    assert forms["adapters"].backbone.adapter == "temporal"
    assert {form.backbone.drop_path for form in forms.values()} == {0.1}
    assert in_form(small_run(), "adapters") is None
    activations = {form: activation_peak(one) for form, one in forms.items()}
    assert activations["plain"] > activations["checkpoint"] > activations["rewired"]


def test_features_have_no_forms() -> None:
    run = find_recipe("thumos14_actionformer_features")
    with pytest.raises(ValueError, match="there is no backbone that could take other forms"):
        in_form(run, "plain")


def test_ranks_share_what_zero_3_shares() -> None:
    one, eight = peaks(transformer_run())
    assert eight < one


def test_in_groups_activations_grow_by_frames_and_features_alone() -> None:
    """From 16 to 64 clips. What is counted is what a step needs, in which `test_clip_groups` counts the same."""
    grown = {}
    for clips_at_once in (None, 4):
        short, long = (activation_peak(transformer_run(n, clips_at_once=clips_at_once)) for n in (64, 256))
        grown[clips_at_once] = long - short
    pixels = 192 * 3 * 48 * 48
    assert grown[4] == pytest.approx(5 * pixels, rel=0.02)  # uint8 and float32
    assert grown[None] > 2 * grown[4]


def test_a_budget_and_groups_of_clips_exclude_each_other() -> None:
    run = transformer_run(clips_at_once=4)
    run = replace(run, engine=replace(run.engine, memory_budget_gb=1.0))
    with pytest.raises(ValueError, match=r"backbone\.clips_at_once 4 and trained_clips 1\.0 its stages run many times"):
        plan_step(run, find_preset("zero3"), world_size=1, num_classes=4, device=CPU)


@pytest.mark.slow
def test_all_of_a_giant_trains_on_1536_frames_in_less_than_16_gb_on_eight_ranks() -> None:
    run = in_form(find_recipe("thumos14_adatad_videomae_giant_224"), "rewired")
    (peak,) = peaks(run, ranks=[8])
    assert peak < 16e9


def test_the_command_prints_all_forms(capsys, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    save_config(path, transformer_run(16))
    with pytest.raises(SystemExit):
        main(["plan", "--config", str(path), "--ds", "zero3", "--forms", "--device", "cpu"])
    said = capsys.readouterr().out
    assert all(form in said for form in FORMS)


def test_the_page_is_written_between_its_marks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(planning_tables, "find_recipe", lambda name: replace(transformer_run(16), name=name))
    path = tmp_path / "page.md"
    path.write_text(f"# Mine\n{BEGIN}\nold\n{END}\nmore\n")
    write_page(path, recipes=["one"], lengths=[16, 64])
    lines = path.read_text().splitlines()
    assert lines[0] == "# Mine"
    assert lines[-1] == "more"
    assert "old" not in lines
    written = path.read_text()
    monkeypatch.setattr(planning_tables, "memory_on_ranks", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_page(path, recipes=["one"], lengths=[16, 64])
    assert path.read_text() == written  # rows that were not reached
    row = next(line for line in lines if line.startswith("| `one`, videomae_nano | 16 x 48 x 48 |"))
    assert len(row.split("|")[3:-1]) == len(FORMS)
    assert any(line.startswith("| 64 | ") for line in lines)
