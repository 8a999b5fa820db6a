"""What a command begins with, and how options change it."""

from functools import partial
from typing import Annotated

import pytest
import tyro

from re2tal.cli import main, own_types
from re2tal.cli.starting_point import starting_point
from re2tal.config import RecognitionConfig, RunConfig, save_config
from re2tal.data.streaming.windows import ResizeWhole, Trimmed
from re2tal.localizers import LOCALIZERS, VSGNConfig
from re2tal.recipes import RECIPES, find_recipe


def configured(*arguments: str) -> RunConfig | RecognitionConfig:
    """As commands do it: the run that `arguments` start from, with the others applied by tyro."""

    start, rest = starting_point(arguments, default="demo")

    def take(*, run: Annotated[RunConfig | RecognitionConfig, tyro.conf.arg(name="")]) -> object:
        return run

    return tyro.cli(partial(take, run=start), args=rest, config=(tyro.conf.AvoidSubcommands,), registry=own_types())


def test_another_localizer_has_its_defaults_which_further_options_change():
    run = configured("--localizer.num-levels", "3", "--localizer", "vsgn")
    assert run.localizer == VSGNConfig(num_levels=3)
    assert run.data == find_recipe("demo").data


@pytest.mark.parametrize("spelling", [["--localizer", "actionformer"], ["--localizer.name=actionformer"]])
def test_the_kind_that_a_run_has_already_stays_as_it_is(spelling):
    assert configured(*spelling) == find_recipe("demo")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("resize_whole", ResizeWhole(num_frames=96)), ("slide", find_recipe("demo").data.clips.windowing)],
)
def test_another_windowing(name, meant):
    changed = () if name == "slide" else ("--data.clips.windowing.num-frames", "96")
    assert configured("--data.clips.windowing", name, *changed).data.clips.windowing == meant


def test_a_kind_is_checked_against_the_rest_once_all_options_are_applied():
    recipe = ("--recipe", "thumos14_actionformer_features", "--data.clips.windowing", "resize_whole")
    run = configured(*recipe, "--data.clips.windowing.num-frames", "2304")
    assert run.data.clips.windowing == ResizeWhole(num_frames=2304)
    with pytest.raises((ValueError, SystemExit)):
        configured(*recipe)


def test_a_recognizer_has_windows_to_choose_but_no_localizer(tmp_path):
    save_config(tmp_path / "config.json", find_recipe("demo_clips"))
    start = ("--config", str(tmp_path / "config.json"))
    assert isinstance(configured(*start).data.clips.windowing, Trimmed | ResizeWhole)
    assert configured(*start, "--data.clips.windowing", "trimmed", "--data.clips.windowing.num-views", "2")
    _, rest = starting_point([*start, "--localizer", "vsgn"], default="demo")
    assert rest == ["--localizer", "vsgn"]  # an option that tyro does not know


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--localizer", "afsd"], "localizer is 'afsd'; known: actionformer, .*vsgn$"),
        (["--data.clips.windowing", "whole"], "data.clips.windowing is 'whole'; known: resize_whole, slide, trimmed$"),
    ],
)
def test_an_unknown_kind_is_answered_with_the_known_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        starting_point(arguments, default="demo")


@pytest.mark.parametrize(
    "options",
    [
        ["--backbone.no-rewired"],
        ["--backbone.no_rewired"],
        ["--backbone.no-recompute"],
        ["--backbone.unit", "block"],
        ["--backbone.unit=block"],
        ["--backbone.name", "slowfast_r50_8x8", "--backbone.no-norm-eval"],
    ],
)
def test_a_recipes_pieces_are_left_out_with_a_word_where_an_option_leaves_them_no_meaning(options, capsys):
    recipe = "thumos14_re2swin_tiny"
    assert find_recipe(recipe).backbone.chunk_mebibytes == 512
    assert configured("--recipe", recipe, *options).backbone.chunk_mebibytes is None
    assert "left out: backbone.chunk_mebibytes 512: without meaning" in capsys.readouterr().err


def test_every_recipe_runs_plain_too(capsys):
    for name in RECIPES:
        assert not configured("--recipe", name, "--backbone.no-rewired").backbone.rewired
    assert "left out: backbone.beta 0.0: without meaning where the backbone is not rewired" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"backbone.beta is 0.5, but the backbone is not rewired"):
        configured("--recipe", "thumos14_adatad_videomae_base", "--backbone.no-rewired", "--backbone.beta", "0.5")


def test_pieces_that_are_typed_for_a_plain_backbone_are_refused():
    with pytest.raises(ValueError, match=r"backbone.chunk_mebibytes is 256.0, but the backbone is not rewired"):
        configured("--recipe", "thumos14_re2swin_tiny", "--backbone.no-rewired", "--backbone.chunk-mebibytes", "256")


@pytest.mark.parametrize("option", ["known", "saved-attention", "stored", "chunk-mebibytes"])
def test_what_saves_memory_in_rebuilding_is_refused_where_nothing_is_rebuilt(option):
    with pytest.raises(ValueError, match=rf"backbone.{option.replace('-', '_')} is 1.*, but backbone.recompute is off"):
        configured("--recipe", "thumos14_re2swin_tiny", "--backbone.no-recompute", f"--backbone.{option}", "1")


def test_what_an_option_does_not_concern_keeps_its_pieces(capsys):
    options = ("--backbone.name", "swin3d_small", "--backbone.unit", "branch", "--backbone.rewired")
    assert configured("--recipe", "thumos14_re2swin_tiny", *options).backbone.chunk_mebibytes == 512
    assert configured("--recipe", "demo", "--backbone.no-rewired") is not None
    assert capsys.readouterr().err == ""


def test_a_runs_own_pieces_are_left_out_too(tmp_path, capsys):
    save_config(tmp_path / "config.json", find_recipe("thumos14_re2swin_tiny"))
    start = ("--config", str(tmp_path / "config.json"))
    assert configured(*start).backbone.chunk_mebibytes == 512
    assert configured(*start, "--backbone.no-rewired").backbone.chunk_mebibytes is None
    assert "left out: " in capsys.readouterr().err


def test_help_lists_the_kinds(capsys):
    starting_point(["--localizer", "vsgn", "--help"], default="demo")
    printed = capsys.readouterr().out
    assert f"--localizer {{{','.join(LOCALIZERS)}}} chooses one with its defaults; here vsgn" in printed
    assert "--data.clips.windowing {resize_whole,slide,trimmed} chooses one with its defaults; here slide" in printed


def test_help_rounds_the_numbers_that_it_shows(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    assert "(default: 0.3 0.4 0.5 0.6 0.7)" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*sorted(RECIPES)[::8], "thumos14_vsgn_features", "demo_clips"])
def test_without_options_a_recipe_stays_what_it_is_to_the_last_bit(name):
    assert configured("--recipe", name) == find_recipe(name)
