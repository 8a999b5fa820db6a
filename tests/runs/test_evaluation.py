"""What can be said of a subset before anything is predicted for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from re2tal.config import RunConfig
from re2tal.evaluation.protocols import EvaluationConfig
from re2tal.runs.evaluation import check_truths
from re2tal.structures import Action, VideoRecord

JUMP = VideoRecord("a", "validation", 9.0, (Action(1.0, 3.0, "jump"),))
OFFICIAL = RunConfig(evaluation=EvaluationConfig(protocol="official"))


def test_a_subset_that_no_prediction_can_be_scored_on_is_refused_before_training() -> None:
    """A test subset, whose actions nobody published."""
    silent = replace(JUMP, actions=())
    with pytest.raises(ValueError, match="none of the 1 ground-truth videos has an annotated action that counts"):
        check_truths([silent], RunConfig(), classes=("jump",))
    check_truths([silent, replace(JUMP, video_id="b")], RunConfig(), classes=("jump", "run"))


def test_a_class_without_truth_is_refused_where_the_protocol_would_at_the_end() -> None:
    with pytest.raises(ValueError, match=r"evaluation.protocol is 'official', .* such as 'run'; set it to 'opentad'"):
        check_truths([JUMP], OFFICIAL, classes=("jump", "run"))
    check_truths([JUMP], OFFICIAL, classes=("jump",))
    agnostic = replace(OFFICIAL, localizer=replace(OFFICIAL.localizer, class_agnostic=True))
    check_truths([JUMP], agnostic, classes=("jump", "run"))
