"""Which recipes there are, what is said of them, and that the page of recipes is what the command writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from re2tal.cli import main
from re2tal.config import RunConfig
from re2tal.data.building.catalog import DATASETS
from re2tal.data.streaming.windows import Slide
from re2tal.localizers.vsgn.config import VSGNConfig
from re2tal.recipes import RECIPES, find_recipe
from re2tal.recipes.about import PUBLISHED, about
from re2tal.recipes.parts import DATA_PARTS
from re2tal.runs.recipes import BEGIN, END, page, write_page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"


def test_every_recipe_has_its_name_and_says_what_it_was_made_for() -> None:
    for name in RECIPES:
        run = find_recipe(name)
        told = about(name, run)
        assert run.name == name
        clips = told.ranks * run.engine.batch_size * run.engine.gradient_accumulation
        assert run.optimizer.made_for_clips == clips, name
    assert set(PUBLISHED) <= set(RECIPES)


def test_the_grid_is_whole() -> None:
    for data in ("thumos14", "activitynet"):
        for backbone in ("swin_tiny", "re2swin_tiny", "slowfast_r101", "re2slowfast_r101"):
            for localizer in ("", "_vsgn"):
                assert {f"{data}_{backbone}{localizer}", f"{data}_{backbone}{localizer}_features"} <= set(RECIPES)
        for backbone in ("re2videomae_base", "re2videomae_large", "re2videomae_huge", "re2vjepa2_large"):
            assert f"{data}_{backbone}" in RECIPES
        assert f"{data}_re2swin_tiny_11gb" in RECIPES
        for size in ("small", "base", "large", "huge", "giant"):
            assert f"{data}_adatad_videomae_{size}" in RECIPES
    for data in DATA_PARTS:
        assert {f"{data}_re2swin_tiny", f"{data}_re2swin_tiny_features"} <= set(RECIPES)
    # Their shards are called as `re2tal shards build --dataset` calls the data sets.
    assert {find_recipe(f"{data}_re2swin_tiny").data.shards.name for data in DATA_PARTS} <= set(DATASETS)


# Total batches and rates of OpenTAD's configs/re2tal and of AdaTAD's.
@pytest.mark.parametrize(
    ("name", "clips", "rate", "backbone_rate"),
    [
        ("thumos14_re2swin_tiny", 2, 1e-4, 1e-5),
        ("thumos14_slowfast_r101", 2, 1e-4, 1e-5),
        ("activitynet_re2swin_tiny", 8, 1e-3, 1e-5),
        ("activitynet_swin_tiny", 8, 1e-3, 1e-5),
        ("thumos14_adatad_videomae_base", 2, 1e-4, 1e-4),
        ("activitynet_adatad_videomae_giant", 16, 1e-3, 1e-4),
        ("activitynet_adatad_videomae_giant_224", 16, 1e-3, 1e-4),
        ("activitynet_re2swin_tiny_11gb", 8, 1e-3, 1e-5),
    ],
)
def test_rates_and_batches_are_those_of_the_source(name: str, clips: int, rate: float, backbone_rate: float) -> None:
    optimizer = find_recipe(name).optimizer
    assert optimizer.made_for_clips == clips
    assert (optimizer.learning_rate, optimizer.backbone_learning_rate) == (rate, backbone_rate)


def test_a_recipe_on_features_keeps_the_seconds_of_its_windows() -> None:
    for data in ("thumos14", "charades", "ego4d_mq", "epic_kitchens_noun"):
        videos, features = (find_recipe(f"{data}_re2swin_tiny{end}").data.clips.windowing for end in ("", "_features"))
        assert isinstance(videos, Slide)
        assert isinstance(features, Slide)
        assert videos.frames_per_second is not None
        assert features.frames_per_second is not None
        assert features.num_frames / features.frames_per_second == videos.num_frames / videos.frames_per_second


def test_steps_of_slowfast_are_those_that_it_can_give_and_no_coarser_than_the_grid() -> None:
    for name in (name for name in RECIPES if "slowfast" in name and not name.endswith("features")):
        run = find_recipe(name)
        if isinstance(run, RunConfig):
            step = run.backbone.frames_per_step
            assert step in (1, 2, 4), name
            assert step * run.num_steps <= run.data.clips.windowing.num_frames, name


def test_plain_and_rewired_differ_in_the_coupling_alone() -> None:
    plain, rewired = find_recipe("thumos14_swin_tiny"), find_recipe("thumos14_re2swin_tiny")
    assert (plain.backbone.beta, rewired.backbone.beta) == (0.0, 1.0)
    assert (plain.backbone.drop_path, rewired.backbone.drop_path) == (0.1, 0.2)
    assert isinstance(plain, RunConfig)
    assert isinstance(rewired, RunConfig)
    assert (plain.localizer, plain.optimizer, plain.data) == (rewired.localizer, rewired.optimizer, rewired.data)


def test_vsgn_stitches_on_windows_and_learns_by_adam() -> None:
    run = find_recipe("thumos14_re2swin_tiny_vsgn")
    assert isinstance(run, RunConfig)
    assert isinstance(run.localizer, VSGNConfig)
    assert isinstance(run.data.clips.windowing, Slide)
    assert run.localizer.stitch_below == 0.4
    assert run.data.clips.windowing.short_share == 0.5
    # 0.38 of a window and the gap leave more than that for the copy.
    short = run.data.clips.windowing.short_length * run.num_steps
    assert run.num_steps - short - run.localizer.stitch_gap > short
    assert run.optimizer.algorithm == "adam"


def test_parts_compose_where_the_list_has_no_row() -> None:
    run = find_recipe("charades_re2videomae_base_vsgn_features")
    assert isinstance(run, RunConfig)
    assert (run.localizer.name, run.backbone.feature_channels) == ("vsgn", 768)
    with pytest.raises(ValueError, match=r"unknown recipe 'charades_re2swin'.* goes with any backbone of .*re2vjepa2"):
        find_recipe("charades_re2swin")


def test_the_page_is_what_the_command_writes() -> None:
    text = PAGE.read_text()
    written = text.partition(BEGIN + "\n")[2].partition(END)[0]
    assert written == page(), "run: re2tal recipes --write docs/recipes.md"


def test_a_page_without_marks_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("# Mine\n")
    with pytest.raises(ValueError, match=r"page\.md has no place for what is written: it needs the line '<!--"):
        write_page(path)
    assert path.read_text() == "# Mine\n"


def test_the_command_lists_and_describes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["recipes"])
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{name} ", listed, re.MULTILINE) for name in RECIPES)
    with pytest.raises(SystemExit):
        main(["recipes", "thumos14_re2slowfast_r101"])
    said = capsys.readouterr().out
    assert "deepspeed --num_gpus 2 launch/train.py --recipe thumos14_re2slowfast_r101" in said
    assert "70.19 (OpenTAD, configs/re2tal); not reproduced here" in said
    assert "2 ranks of 1: 2 clips a step" in said
    with pytest.raises(SystemExit):
        main(["recipes", "hacs_re2swin_tiny"])
    assert "none published" in capsys.readouterr().out


def test_memory_is_planned_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["recipes", "demo", "--memory"])
    found = re.search(r"memory +([\d.]+) GiB a rank, planned for 1", capsys.readouterr().out)
    assert found is not None
    assert 0.05 < float(found[1]) < 5
