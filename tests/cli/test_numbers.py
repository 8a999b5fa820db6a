"""Numbers that mean nothing are refused by the name of their option, before any work; and so are empty paths."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

import re2tal
from re2tal.cli import main
from re2tal.cli.shards import Annotate, Index, shards
from re2tal.runs.comparison import ComparisonOptions, compare
from re2tal.runs.detection import detect
from re2tal.runs.detection_job import DetectionOptions
from re2tal.runs.feature_extraction import Extract, extract
from re2tal.runs.feature_packing import Pack, pack
from re2tal.runs.merging import MergeOptions, merge_results
from re2tal.runs.shard_building import Build, build
from re2tal.runs.viewing import ViewOptions, open_viewer

NOWHERE = Path("nowhere")
SHARE = "give a number from 0 to 1"
RUNS: dict[type, Callable[..., Any]] = {
    Build: lambda **given: build(Build(out=NOWHERE, **given)),
    Index: lambda **given: shards(Index(NOWHERE, NOWHERE, **given)),
    Annotate: lambda **given: shards(Annotate(NOWHERE, NOWHERE, **given)),
    Extract: lambda **given: extract(Extract((NOWHERE,), NOWHERE, **given)),
    Pack: lambda **given: pack(Pack(NOWHERE, NOWHERE, NOWHERE, **given)),
    DetectionOptions: lambda **given: detect(NOWHERE, [NOWHERE], wanted=DetectionOptions(**given)),
    MergeOptions: lambda **given: merge_results([NOWHERE], NOWHERE, MergeOptions(**given)),
    re2tal.ScoringOptions: lambda **given: re2tal.evaluate(NOWHERE, NOWHERE, re2tal.ScoringOptions(**given)),
    ComparisonOptions: lambda **given: compare(NOWHERE, NOWHERE, options=ComparisonOptions(**given)),
    ViewOptions: lambda **given: open_viewer(NOWHERE, ViewOptions(**given)),
}


@pytest.mark.parametrize(
    ("options", "name", "value", "wanted"),
    [
        (Build, "seed", -1, "give 0 or more"),
        (Build, "frames", 0, "give 1 or more"),
        (Build, "videos_per_shard", 0, "give 1 or more"),
        (Build, "max_rejected", nan, SHARE),
        (Build, "max_damaged", -0.1, SHARE),
        (Index, "max_rejected", nan, SHARE),
        (Annotate, "max_rejected", 2.0, SHARE),
        (Extract, "seed", -1, "give 0 or more"),
        (Extract, "workers", -1, "give 0 or more"),
        (Extract, "batch_size", 0, "give 1 or more"),
        (Extract, "fps", 0.0, "give a positive number"),
        (Extract, "overlap", 1.0, "give a number from 0 to below 1"),
        (Extract, "max_rejected", nan, SHARE),
        (Pack, "seed", -1, "give 0 or more"),
        (Pack, "fps", inf, "give a positive number"),
        (Pack, "resized", -3, "give 1 or more"),
        (Pack, "max_rejected", nan, SHARE),
        (DetectionOptions, "top_k", 0, "give 1 or more"),
        (DetectionOptions, "top", 0, "give 1 or more"),
        (DetectionOptions, "min_score", nan, SHARE),
        (MergeOptions, "top_k", -1, "give 1 or more"),
        (re2tal.ScoringOptions, "proposals", 0, "give 1 or more"),
        (re2tal.ScoringOptions, "top_kx", (1, 0), "give 1 or more"),
        (re2tal.ScoringOptions, "bootstrap", -5, "give at least 2 draws, customary are 1000, or 0 for none"),
        (re2tal.ScoringOptions, "bootstrap_seed", -1, "give 0 or more"),
        (re2tal.ScoringOptions, "tiou_thresholds", (nan,), r"give at least one number in \(0, 1]"),
        (re2tal.ScoringOptions, "tiou_thresholds", (), r"give at least one number in \(0, 1]"),
        (ComparisonOptions, "draws", 1, "give at least 2 draws; customary are 1000"),
        (ComparisonOptions, "seed", -1, "give 0 or more"),
        (ViewOptions, "port", 70000, "give a number from 0"),
    ],
)
def test_a_number_without_a_meaning_is_refused(options, name, value, wanted) -> None:
    with pytest.raises(ValueError, match=f"{name.replace('_', '.')} is .*; {wanted}"):
        RUNS[options](**{name: value})


def test_damage_is_a_share_of_a_video() -> None:
    with pytest.raises(ValueError, match=f"--max-damaged is nan; {SHARE}"):
        detect(max_damaged=nan)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shards", "verify", ""], "['']"),
        (["shards", "verify"], "no folder was given; name folders of one subset each"),
        (["report", "--run", ""], "the path is empty; name a file or a folder"),
        (["detect", ""], "one of the paths is empty"),
    ],
)
def test_what_a_variable_that_is_not_set_leaves_is_refused(arguments, message, capsys) -> None:
    """As in `re2tal shards verify "$FOLDERS"`: an empty path is the folder at hand, and no path at all is sound."""
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())
