"""Files of detections: hand-worked subtitles, and what the readers of annotation tools make of the others."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from re2tal.data.building.annotation_formats.formats import read_files
from re2tal.data.building.annotation_formats.found import Found, Wanted
from re2tal.evaluation.results import read_results
from re2tal.reporting.annotation_files import eaf
from re2tal.reporting.found import FoundInVideo
from re2tal.reporting.result_files import RESULT_FORMATS, ResultsFile, choose_format
from re2tal.reporting.subtitles import srt, webvtt
from re2tal.structures import Detections

CLASSES = ("jump", 'run <b>"fast"</b> & --> away')
ROWS = [(3661.0004, 3662.25, 0.875, 0), (0.5, 1.75, 0.5, 1), (1.0, 2.0, 0.25, 1), (9.0, 9.0002, 0.1, 0)]


def video(name: str = "my party (1).v2") -> FoundInVideo:
    starts, ends, scores, labels = zip(*ROWS, strict=True)
    segments = torch.tensor([starts, ends], dtype=torch.float64).T
    found = Detections(segments, torch.tensor(scores), torch.tensor(labels))
    return FoundInVideo(name, Path(f"/videos of us/{name}.mp4"), 4000.0, found, CLASSES)


def test_subtitles_by_hand() -> None:
    assert srt(video()) == (
        '1\n00:00:00,500 --> 00:00:01,750\nrun \u2039b\u203a"fast"\u2039/b\u203a & --\u203a away (0.50)\n\n'
        '2\n00:00:01,000 --> 00:00:02,000\nrun \u2039b\u203a"fast"\u2039/b\u203a & --\u203a away (0.25)\n\n'
        "3\n00:00:09,000 --> 00:00:09,001\njump (0.10)\n\n"
        "4\n01:01:01,000 --> 01:01:02,250\njump (0.88)\n"
    )
    assert webvtt(video()).startswith(
        "WEBVTT\n\n00:00:00.500 --> 00:00:01.750\n"
        'run &lt;b&gt;"fast"&lt;/b&gt; &amp; --&gt; away (0.50)\n\n00:00:01.000 --> 00:00:02.000\n'
    )


def test_videos_deep_in_folders_have_files_of_their_own(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "out", "srt", CLASSES)
    names = ["folder \u00e9/" * 40 + f"{side}/a.mp4" for side in ("left", "right")]
    names.append("other/" * 60 + names[0])
    for name in names:
        results.add(video(name))
    assert len([*(tmp_path / "out").iterdir()]) == 3
    assert all(path.name.endswith("%2Fa.mp4.srt") for path in (tmp_path / "out").iterdir())


def test_no_two_tiers_of_elan_have_one_name() -> None:
    found = Detections(torch.tensor([[0.0, 2.0], [1.0, 3.0], [0.0, 2.0]]), torch.ones(3), torch.tensor([0, 0, 1]))
    tree = ElementTree.fromstring(eaf(FoundInVideo("a", None, 4.0, found, ("jump", "jump (2)"))))
    assert [tier.get("TIER_ID") for tier in tree.iter("TIER")] == ["jump", "jump (2)'", "jump (2)"]


@pytest.mark.parametrize(("format_name", "reader"), [("csv", "csv"), ("boris", "boris"), ("eaf", "elan")])
def test_annotations_convert_reads_them_back(tmp_path: Path, format_name: str, reader: str) -> None:
    path = tmp_path / f"found{RESULT_FORMATS[format_name].suffix}"
    results = ResultsFile(path, format_name, CLASSES)
    results.add(video())
    results.write()
    found = Found(Wanted())
    assert read_files([path], format_name=None, found=found) == {path: reader}
    (read,) = found.videos.values()
    segments = sorted(read.actions)
    expected = sorted((a, b, CLASSES[label]) for a, b, _, label in ROWS)
    if format_name != "csv":  # at least a millisecond
        expected = [(a, max(b, a + 0.001), label) for a, b, label in expected]
    assert [label for *_, label in segments] == [label for *_, label in expected]
    for one, other in zip(segments, expected, strict=True):
        assert one[:2] == pytest.approx(other[:2], abs=6e-4)


def test_elan_has_nothing_that_overlaps_on_a_tier() -> None:
    text = RESULT_FORMATS["eaf"].for_each(video())
    root = ElementTree.fromstring(text)
    assert [(tier.get("TIER_ID"), len(tier)) for tier in root.iter("TIER")] == [
        ("jump", 2),
        (CLASSES[1], 1),
        (f"{CLASSES[1]} (2)", 1),
    ]
    assert root.find("HEADER/MEDIA_DESCRIPTOR").get("MEDIA_URL") == "file:///videos of us/my party (1).v2.mp4"


def test_a_pipe_gets_one_document_and_is_never_somebody_elses_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    results = ResultsFile(pipe, "json", CLASSES)
    results.add(video())
    results.save()
    os.utime(pipe, (1.0, 1.0))  # as a terminal's changes where something is printed
    results.write()
    assert json.loads(os.read(end, 1 << 16))["results"].keys() == {"my party (1).v2"}
    assert [*tmp_path.iterdir()] == [pipe]
    os.close(end)


def test_json_is_activitynets_and_grows_video_by_video(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "found.json", "json", CLASSES)
    for number, name in enumerate(("one", "two"), start=1):
        results.add(video(name))
        results.write()
        assert len(read_results(tmp_path / "found.json").predictions) == number
    assert results.num_written == 8
    again = ResultsFile(tmp_path / "found.json", "json", CLASSES[::-1])  # whatever their order, names are kept
    assert again.take_up({"two": Path("two.mp4"), "three": Path("three.mp4")}) == {"two"}
    again.write()
    one, two = read_results(tmp_path / "found.json").of("two"), video("two").detections
    names = read_results(tmp_path / "found.json").classes
    assert [names[label] for label in one.labels] == [CLASSES[label] for label in two.labels]
    with pytest.raises(ValueError, match=r"add: .*found\.json has '.*', which the model does not know"):
        ResultsFile(tmp_path / "found.json", "json", ("other",)).take_up({})


def test_results_of_other_weights_options_or_files_are_not_gone_on_with(tmp_path: Path) -> None:
    out, file, made_with = tmp_path / "found.json", tmp_path / "one.mp4", {"weights": "a", "top": None}
    file.write_bytes(b"12345")
    results = ResultsFile(out, "json", CLASSES, made_with)
    results.add(replace(video("one"), path=file))
    results.write()
    again = ResultsFile(out, "json", CLASSES, made_with)
    assert again.take_up({"one": file}) == {"one"}
    again.write()  # keeps the size of a file that is not looked at again
    for others, message in (
        ({"weights": "b", "top": None}, "was made with weights 'a', and here it is 'b'; use the same"),
        ({"weights": "a", "top": 3}, "was made with top None, and here it is 3; use the same"),
        ({**made_with, "flip": True}, "does not say with which flip it was made"),
    ):
        with pytest.raises(ValueError, match=rf"add: .*found\.json {message}"):
            ResultsFile(out, "json", CLASSES, others).take_up({"one": file})
    file.write_bytes(b"another")
    with pytest.raises(ValueError, match=r"has results of another file called 'one', of 5 bytes, where .* has 7"):
        ResultsFile(out, "json", CLASSES, made_with).take_up({"one": file})


def test_what_another_program_writes_meanwhile_stays(tmp_path: Path) -> None:
    ours, theirs = (ResultsFile(tmp_path / "found.json", "json", CLASSES) for _ in range(2))
    for results, name in ((theirs, "one"), (ours, "two"), (theirs, "three"), (ours, "four")):
        results.add(video(name))
        results.write()
    assert theirs.spared is None
    assert (ours.spared, ours.out) == (tmp_path / "found.json", tmp_path / "found-2.json")
    assert list(read_results(theirs.out).predictions) == ["one", "three"]
    assert list(read_results(ours.out).predictions) == ["two", "four"]


def test_a_place_that_takes_no_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    for place in (tmp_path / "a.json", Path("/proc/a.json")):
        with pytest.raises(ValueError, match=r"a\.json cannot be written: .*; give another place"):
            ResultsFile(place, "json", CLASSES)
    (tmp_path / "annotations.json").write_text('{"database": {}}')
    with pytest.raises(ValueError, match=r"annotations\.json is there already and holds no results"):
        ResultsFile(tmp_path / "annotations.json", "json", CLASSES)


def test_each_video_has_its_own_subtitles_in_a_folder(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "subtitles", "srt", CLASSES)
    for name in ("a.b", "x/twin", "y/twin"):
        results.add(video(name))
    assert sorted(path.name for path in (tmp_path / "subtitles").iterdir()) == [
        "a.b.srt",
        "x%2Ftwin.srt",
        "y%2Ftwin.srt",
    ]


def test_the_format_is_that_of_the_suffix() -> None:
    assert choose_format(None, None) == "json"
    assert choose_format("srt", Path("x.json")) == "srt"
    assert [choose_format(None, Path(f"x{row.suffix}")) for row in RESULT_FORMATS.values()] == list(RESULT_FORMATS)
    with pytest.raises(ValueError, match=r"out is found\.xml, whose suffix says no format; end it in one of \.json"):
        choose_format(None, Path("found.xml"))
    with pytest.raises(ValueError, match="format is 'xls'; known: json, csv"):
        choose_format("xls", None)
