"""`re2tal datasets`: the list, all of one, and an annotation file compared with it."""

import json
import re
from pathlib import Path

import pytest

from re2tal.cli import main
from re2tal.data.building.catalog import DATASETS

FACTS = {name: spec.facts for name, spec in DATASETS.items() if spec.facts is not None}


def run(capsys, *arguments: object) -> tuple[int, list[str], str]:
    with pytest.raises(SystemExit) as end:
        main(["datasets", *map(str, arguments)])
    out, err = capsys.readouterr()
    return end.value.code, out.splitlines(), err


def write(path: Path, *, numbers: dict[str, tuple[int, int]], labels: list[str]) -> Path:
    """Annotations with (videos, actions) by subset; labels take turns."""
    database = {
        f"{subset}-{number}": {
            "subset": subset,
            "duration": 10.0,
            "annotations": [
                {"segment": [1, 2], "label": labels[one % len(labels)]} for one in range(number, actions, videos)
            ],
        }
        for subset, (videos, actions) in numbers.items()
        for number in range(videos)
    }
    path.write_text(json.dumps({"database": database}))
    return path


def test_every_data_set_is_listed_with_its_numbers(capsys):
    code, lines, _ = run(capsys)
    assert code == 0
    assert [line.split()[0] for line in lines[2:-1]] == [*FACTS]
    (thumos,) = (line for line in lines if line.startswith("thumos14 "))
    assert re.split("  +", thumos) == ["thumos14", "THUMOS14", "20", "200", "213", "0.3 to 0.7 by 0.1"]


@pytest.mark.parametrize("name", FACTS)
def test_all_of_one_is_printed(capsys, name):
    code, lines, _ = run(capsys, name)
    assert code == 0
    text = " ".join(" ".join(lines).split())
    facts = FACTS[name]
    assert all(" ".join(trap.split()) in text for trap in (*facts.traps, facts.source))
    assert max(map(len, lines)) <= 110


def test_a_whole_file_has_no_difference_under_either_name_of_its_subsets(capsys, tmp_path):
    labels = [*DATASETS["thumos14"].classes]
    for names in (("training", "validation"), ("Validation", "Test")):
        numbers = dict(zip(names, ((200, 3007), (212, 3358)), strict=True))
        path = write(tmp_path / "a.json", numbers=numbers, labels=labels)
        code, lines, _ = run(capsys, "thumos14", "--check", path)
        assert (code, lines[-1]) == (0, f"{path}: 412 videos, 6365 actions; as it should be for THUMOS14")


def test_each_difference_is_named(capsys, tmp_path):
    labels = [*DATASETS["thumos14"].classes[1:], "Ambiguous", "Golf"]
    path = write(tmp_path / "a.json", numbers={"training": (199, 21 * 200), "other": (1, 0)}, labels=labels)
    code, lines, _ = run(capsys, "thumos14", "--check", path)
    assert code == 1
    assert [line.removeprefix(f"{path}: ") for line in lines] == [
        "training: 199 videos, 1 fewer than 200 (officially the validation set)",
        "training: 4000 actions, 993 more than 3007 (officially the validation set)",
        "there is no validation; wanted 213 or 212 or 211 or 210 videos; there are ['other', 'training']",
        "it has other subsets: other",
        "1 classes have no action: 'BaseballPitch'",
        "1 labels are no classes of it: 'Golf'",
        "200 videos, 4000 actions; 6 differences from THUMOS14",
    ]
    numbers = {"training": (7985, 60000), "testing": (1863, 6501)}
    path = write(tmp_path / "c.json", numbers=numbers, labels=[f"c{number:03d}" for number in range(156)])
    code, lines, _ = run(capsys, "charades", "--check", path)
    assert [line.removeprefix(f"{path}: ") for line in lines[:-1]] == [
        "subset 'testing' is what recipes call 'validation'",
        "66501 actions in all, 1 more than 66500",
        "156 classes, 1 fewer than 157",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["thumos"], "nothing is known of a data set 'thumos'; known: activitynet, thumos14, hacs"),
        (["--check", "a.json"], "--check a.json needs a NAME"),
        (["urfd", "--check", "nowhere.json"], "nowhere.json is not a file"),
    ],
)
def test_what_cannot_be_compared_is_refused(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in err
