"""No vector lies unread: a test reads every kind of file in the folder, and the repository has one of each kind."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest
from parity.arguments import Arguments
from parity.test_adatad import every_case as adatad
from parity.test_detector import DETECTORS
from parity.vectors import cases, vectors_dir

KINDS = {
    "swin_masks.npz",
    "swin_mmaction_*",
    "swin_torchvision_*",
    "re2swin_opentad_*",
    "slowfast_mmaction_*",
    "re2slowfast_opentad_*",
    "det_*",
    "actionformer_*",
    "vsgn_coolbay*",
    "vsgn_opentad_*",
    "tridet_*",
    "temporalmaxer_*",
    "videomae_mmaction_*",
    "videomae_pos_*",
    "videomae_adapter_*",
    "nms.npz",
    "nms_cases.json",
    "eval.npz",
    "eval_*_gt.json",
    "eval_*_pred.json",
    "detad_*.json",
    "protocol_epic_*.json",
    "augmentation_*.npz",
}


def test_every_file_is_of_a_kind_that_a_test_reads() -> None:
    files = {path.name for path in vectors_dir().iterdir()} - {"README.md", "configs.json"}
    read = {name for kind in KINDS for name in fnmatch.filter(files, kind)}
    assert files <= read, f"no test reads {sorted(files - read)}"
    assert {*cases("det_")} == {*DETECTORS, *adatad.args[1]}, "a detector whose backbone no test builds"


def test_the_repository_has_a_case_of_every_kind() -> None:
    kept = [path.name for path in (Path(__file__).parent / "vectors").iterdir()]
    assert [kind for kind in sorted(KINDS) if not fnmatch.filter(kept, kind)] == []


def read(given: dict[str, object]) -> tuple[object, object]:
    with Arguments("neck", given) as neck:
        neck.only("type", "A", "B")
        return neck.take("levels"), neck.take("width", 3)


def test_an_argument_that_nobody_takes_is_an_error_that_names_it() -> None:
    assert read({"levels": [1, 2], "type": "B"}) == ((1, 2), 3)
    for given, message in (
        ({"levels": 3, "scale": 2}, "neck: no option of ours for {'scale': 2}"),
        ({}, "neck.levels is missing"),
        ({"levels": 3, "type": "C"}, "neck.type is 'C'; ours is one of ('A', 'B')"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            read(given)
