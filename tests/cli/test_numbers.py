"""Numbers that mean nothing are refused by the name of their option, before any work."""

from __future__ import annotations

from math import inf, nan
from pathlib import Path

import pytest

import re2tal
from re2tal.cli.shards import Annotate, Index
from re2tal.runs.comparison import ComparisonOptions
from re2tal.runs.detection import detect
from re2tal.runs.detection_job import DetectionOptions
from re2tal.runs.feature_extraction import Extract
from re2tal.runs.feature_packing import Pack
from re2tal.runs.merging import MergeOptions
from re2tal.runs.shard_building import Build
from re2tal.runs.viewing import ViewOptions, open_viewer

HERE = Path()
SHARE = "give a number from 0 to 1"


@pytest.mark.parametrize(
    ("make", "name", "value", "wanted"),
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
        (ComparisonOptions, "draws", 1, "give at least 2 draws; customary are 1000"),
        (ComparisonOptions, "seed", -1, "give 0 or more"),
        (ComparisonOptions, "tiou_thresholds", (0.0,), r"give at least one number in \(0, 1]"),
    ],
)
def test_a_number_without_a_meaning_is_refused(make, name, value, wanted) -> None:
    needed = {"shards": (HERE,), "out": HERE, "tars": HERE, "features": HERE, "annotations": HERE}
    needed = {key: one for key, one in needed.items() if key in make.__dataclass_fields__}
    make(**needed)
    with pytest.raises(ValueError, match=f"{name.replace('_', '.')} is .*; {wanted}"):
        make(**needed, **{name: value})


def test_detections_and_the_page_refuse_theirs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--max-damaged is nan; {SHARE}"):
        detect(max_damaged=nan)
    with pytest.raises(ValueError, match="--port is 70000; give a number from 0"):
        open_viewer(tmp_path, ViewOptions(port=70000))
