"""A small file of each tool's layout, with values worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from re2tal.data.building.annotation_formats.formats import FORMATS, read_files, recognise
from re2tal.data.building.annotation_formats.found import Found, Wanted, as_seconds, video_id_of
from re2tal.data.building.annotation_formats.source import Source

Actions = dict[str, list[tuple[float, float, str]]]


def found_in(tmp_path: Path, name: str, content: Any, *, expect: str, **wanted: Any) -> Found:
    """What is found in a file that must be recognised as `expect`."""
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    measure = wanted.pop("measure", None)
    found = Found(Wanted(**wanted), measure)
    assert recognise(Source(path)) == expect
    read_files([path], format_name=None, found=found)
    return found


def actions(found: Found) -> Actions:
    return {name: one.actions for name, one in found.videos.items()}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (3.7, 3.7),
        ("3.7", 3.7),
        ("3,7", 3.7),
        ("01:02.5", 62.5),
        ("1:02:03,500", 3723.5),
        ("00:00:01.089", 1.089),
        ("75:30", 4530.0),
        ("1,000", None),
        ("12,345", None),
        ("0,500", 0.5),
        ("1_000", None),
        ("\N{ARABIC-INDIC DIGIT ONE}:20", None),
        ("1:75", None),
        ("1:75:00", None),
        ("nan", None),
        ("inf", None),
        ("1e400", None),
        ("", None),
        (None, None),
        (True, None),
        (10**400, None),
    ],
)
def test_times(text: Any, seconds: float | None) -> None:
    assert as_seconds(text) == seconds


@pytest.mark.parametrize(
    ("name", "video_id"),
    [
        ("s3://bucket/a%20b#2.mp4", "a%20b#2"),
        ("clip_00.mp4", "clip_00"),
        ("C:\\videos\\clip_00.MKV", "clip_00"),
        ("file:///home/me/my%20clip.mp4", "my clip"),
        ("/data/local-files/?d=sub%2Fclip_00.mp4", "clip_00"),
        ("/data/upload/1/0a1b2c3d-clip_00.mp4", "clip_00"),
        ("https://host/a/clip_00.webm?x=1", "clip_00"),
        ("v1.2", "v1.2"),
        ("https://www.youtube.com/watch?v=AAA&t=3s", "AAA"),
        ("youtube.com/watch?v=BBB", "BBB"),
        ("https://youtu.be/AAA", "AAA"),
        ("http://[bad/a.mp4", ""),
    ],
)
def test_the_id_in_a_name(name: str, video_id: str) -> None:
    assert video_id_of(name) == video_id


@pytest.mark.parametrize(
    ("names", "clash"),
    [
        (("train/0001.mp4", "test/0001.mp4"), "'train/0001.mp4' and 'test/0001.mp4' both give this id"),
        (("0001", "train/0001.mp4", "test/0001.mp4"), "'train/0001.mp4' and 'test/0001.mp4' both give"),
        (("a.mp4", "a.mkv"), "'a.mp4' and 'a.mkv' both give this id"),
        (("https://h/get?id=1", "https://h/get?id=2"), "both give this id"),
        (("/data/upload/1/0a1b2c3d-a.mp4", "/data/upload/1/1a1b2c3d-a.mp4"), "both give this id"),
        (("a", "../a.mp4", "x/a.MP4", "/y/x/a.mp4", "a"), None),
        (("https://www.youtube.com/watch?v=AAA", "https://youtu.be/AAA", "AAA"), None),
        (("https://h/a.mp4?signed=1", "https://h/a.mp4?signed=2"), None),
    ],
)
def test_two_names_that_give_one_id_are_told(names, clash):
    found = Found(Wanted())
    for name in names:
        found.action("here", name, 1, 2, "run")
    assert len(found.clashes) == (clash is not None)
    assert not clash or clash in next(iter(found.clashes.values()))


def test_a_video_in_two_subsets_is_told(tmp_path):
    text = "video,start,end,label,subset\na,1,2,run,train\na,2,3,run,training\na,3,4,run,test\n"
    found = found_in(tmp_path, "l.csv", text, expect="csv")
    assert found.clashes == {"a": "it is in 'train' and in 'test': keep one"}


def test_an_unusable_address_costs_its_row_only(tmp_path):
    text = "video,start,end,label\na,1,2,run\nhttp://[bad/a.mp4,1,2,run\nb,1,2,run\n"
    found = found_in(tmp_path, "l.csv", text, expect="csv")
    assert list(actions(found)) == ["a", "b"]
    assert found.left_out == ["l.csv row 3: its video 'http://[bad/a.mp4' is no name of a file"]
    task = {"video": "http://[bad/a.mp4", "x": [{"start": 1, "end": 2, "labels": ["run"]}]}
    found = found_in(tmp_path, "l.json", [task, task | {"video": "b.mp4"}], expect="label-studio")
    assert actions(found) == {"b": [(1.0, 2.0, "run")]}
    assert found.left_out


def test_activitynet_as_hacs_and_opentad_write_it(tmp_path):
    entry = {"subset": "training", "duration": "92.166667", "annotations": [{"segment": [1, 2.5], "label": "run"}]}
    bad = {"segment": [3, 3], "label": "run"}, {"segment": [5, 4], "label": "run"}, {"segment": [1]}, "x"
    entry["annotations"] += bad
    content = {"database": {"a": entry, "t": {"subset": "test", "duration": 5, "frame": 150}, "odd": 3}}
    found = found_in(tmp_path, "a.json", content, expect="activitynet")
    assert actions(found) == {"a": [(1.0, 2.5, "run")], "t": []}
    assert found.videos["a"].duration_seconds == 92.166667
    assert (found.videos["t"].is_known, found.videos["t"].facts) == (False, {"frame": 150.0})
    assert [line.partition(": ")[2][:30] for line in found.left_out] == [
        "its segment 3 to 3 s lasts no ",
        "its segment 5 to 4 s is revers",
        "its times are None and None: n",
        "its times are None and None: n",
        "it is no object with a subset,",
    ]


def test_mmaction(tmp_path):
    action = {"segment": [3.7, 9.1], "label": "arm"}
    entry = {"duration_second": 61.0, "duration_frame": 1830, "annotations": [action], "fps": 30.0, "rfps": 30}
    found = found_in(tmp_path, "anet_anno_val.json", {"clip_00": entry}, expect="mmaction")
    assert actions(found) == {"clip_00": [(3.7, 9.1, "arm")]}
    one = found.videos["clip_00"]
    assert (one.duration_seconds, one.facts, one.subset) == (61.0, {"frame": 1830.0, "fps": 30.0}, "validation")


def test_multithumos_counts_classes_from_1_and_charades_from_0(tmp_path):
    content = {"video_test_0000004": {"subset": "testing", "duration": 33, "actions": [[1, 0.2, 1.1], [2, 3, 2]]}}
    found = found_in(tmp_path, "m.json", content, expect="multithumos", classes=("pitch", "dunk"))
    assert actions(found) == {"video_test_0000004": [(0.2, 1.1, "pitch")]}
    assert found.videos["video_test_0000004"].subset == "validation"
    assert "reversed" in found.left_out[0]
    content = {"AAAAA": {"subset": "training", "duration": 33, "actions": [[0, 0, 1], [1, 3, 4]]}}
    found = found_in(tmp_path, "c.json", content, expect="multithumos", classes=("hold", "sit"))
    assert actions(found) == {"AAAAA": [(0.0, 1.0, "hold"), (3.0, 4.0, "sit")]}


def test_numbers_of_classes_that_may_count_from_0_or_1_are_refused(tmp_path):
    content = {"AAAAA": {"subset": "training", "duration": 33, "actions": [[1, 0, 1]]}}
    found = found_in(tmp_path, "c.json", content, expect="multithumos", classes=("hold", "sit"))
    assert "they may count from 0 or from 1; write numbers into --classes" in found.left_out[0]
    for numbers, label in (((0, 1), "sit"), ((1, 2), "hold"), ((7, 1), "sit")):
        wanted = {"classes": ("hold", "sit"), "numbers": numbers}
        found = found_in(tmp_path, "c.json", content, expect="multithumos", **wanted)
        assert actions(found) == {"AAAAA": [(0.0, 1.0, label)]}
    assert actions(found_in(tmp_path, "c.json", content, expect="multithumos")) == {"AAAAA": [(0.0, 1.0, "1")]}


@pytest.mark.parametrize(
    ("expect", "content"),
    [
        ("activitynet", {"database": {"a": {"subset": "training", "annotations": {"0": {}}}}}),
        ("activitynet", {"database": {"a": {"subset": "training", "annotations": None}}}),
        ("multithumos", {"a": {"subset": "training", "actions": None}}),
        ("label-studio", [{"data": {"video": "a.mp4"}, "annotations": None}]),
        ("label-studio", [{"data": {"video": "a.mp4"}, "annotations": [3]}]),
        ("label-studio", [{"data": {"video": "a.mp4"}, "annotations": [{"result": {}}]}]),
        ("label-studio", [{"video": "a.mp4", "x": [{"timelinelabels": ["arm"]}]}]),
        ("label-studio", [{"video": "a.mp4", "x": [{"ranges": [{"start": 1, "end": 2}], "timelinelabels": "arm"}]}]),
        ("label-studio", [{"video": "a.mp4", "x": [{"start": 1, "end": 2, "labels": "arm"}]}]),
        ("boris-project", {"behaviors_conf": {}, "observations": {"o": {"file": {"1": ["a.mp4"]}, "events": None}}}),
        ("via", {"attribute": {}, "file": {}, "view": {}, "metadata": []}),
        ("ego4d", {"videos": [{"clips": None}]}),
    ],
)
def test_values_of_another_type_are_named(tmp_path, expect, content):
    found = found_in(tmp_path, "x.json", content, expect=expect, fps=10.0)
    assert len(found.left_out) == 1
    assert not any(one.is_known for one in found.videos.values()) or expect in ("label-studio", "boris-project")


def test_epic_without_the_column_that_is_wanted(tmp_path):
    text = EPIC.replace("noun_class", "noun_number")
    found = found_in(tmp_path, "EPIC_100_train.csv", text, expect="epic", label="verb")
    assert actions(found) == {"P01_01": [(0.14, 63.37, "id_003"), (4.37, 6.17, "id_006")]}
    found = found_in(tmp_path, "EPIC_100_train.csv", text, expect="epic", label="noun")
    assert (actions(found), "has no column noun_class" in found.left_out[0]) == ({}, True)


def test_charades_csv(tmp_path):
    text = 'id,subject,actions,length\n46GP8,HR43,c092 11.90 21.20;c147 0.00 12.60,24.83\nN11GT,0,"",18.33\n'
    found = found_in(tmp_path, "Charades_v1_train.csv", text, expect="charades")
    assert actions(found) == {"46GP8": [(11.9, 21.2, "c092"), (0.0, 12.6, "c147")], "N11GT": []}
    assert (found.videos["46GP8"].duration_seconds, found.videos["46GP8"].subset) == (24.83, "training")


def test_a_line_of_thumos_ends_where_its_file_says(tmp_path):
    found = found_in(tmp_path, "Dive_val.txt", "a 1.0 2.0\nb\u2028c 1 2\r\nd 3 4\x0be 5 6\rf 7 8", expect="thumos")
    assert list(actions(found)) == ["a", "f"]
    assert [line.partition(":")[0] for line in found.left_out] == ["Dive_val.txt line 2", "Dive_val.txt line 3"]


def test_a_comma_that_may_part_thousands_is_refused_by_name(tmp_path):
    content = {
        "a": {"subset": "training", "duration": 2000, "annotations": [{"segment": ["1,000", "1,5"], "label": "x"}]}
    }
    found = found_in(tmp_path, "a.json", content, expect="activitynet")
    assert "its times are '1,000' and '1,5': decimals or thousands? Write decimals with a point" in found.left_out[0]
    found = found_in(tmp_path, "t.csv", "video\tstart\tend\tlabel\na\t1,000\t2,000\tx", expect="csv")
    assert "decimals or thousands?" in found.left_out[0]
    found = found_in(tmp_path, "s.csv", "video;start;end;label\na;1,000;2,500;x", expect="csv")
    assert actions(found) == {"a": [(1.0, 2.5, "x")]}


@pytest.mark.parametrize(
    ("duration", "told"),
    [
        ("1,000", "'1,000', and is not taken: decimals or thousands?"),
        ("long", "'long', and is not taken: no seconds, mm:ss or hh:mm:ss"),
        (-3, "-3, and is not taken: no seconds, mm:ss or hh:mm:ss"),
        (0, None),
        (None, None),
    ],
)
def test_a_duration_that_is_no_time_is_told(tmp_path, duration, told):
    content = {"database": {"a": {"subset": "train", "duration": duration, "annotations": []}}}
    found = found_in(tmp_path, "a.json", content, expect="activitynet")
    assert list(found.notes) == ([f"the duration of 'a' is {told}"] if told else [])
    assert found.videos["a"].duration_seconds is None


def test_frames_and_rates_that_are_no_numbers_are_told(tmp_path):
    content = {"database": {"a": {"subset": "train", "frame": "1,000", "fps": "30", "annotations": []}}}
    found = found_in(tmp_path, "a.json", content, expect="activitynet")
    assert found.videos["a"].facts == {"fps": 30}
    assert list(found.notes) == ["frame of 'a' is '1,000', and is not taken: no number"]


def test_thumos_text_files(tmp_path):
    text = "video_validation_0000266  72.8 76.4\nvideo_validation_0000681  44.0 50.9\n\nvideo_validation_1 x 3\n"
    found = found_in(tmp_path, "BaseballPitch_val.txt", text, expect="thumos")
    assert actions(found) == {
        "video_validation_0000266": [(72.8, 76.4, "BaseballPitch")],
        "video_validation_0000681": [(44.0, 50.9, "BaseballPitch")],
    }
    assert found.videos["video_validation_0000266"].subset == "training"
    assert found.left_out == ["BaseballPitch_val.txt line 4: 'video_validation_1 x 3' is no video, start and end"]
    found = found_in(tmp_path, "Ambiguous_test.txt", "video_test_0000004 0.2 1.1", expect="thumos")
    assert actions(found) == {"video_test_0000004": [(0.2, 1.1, "Ambiguous")]}
    assert found.videos["video_test_0000004"].subset == "validation"


EPIC = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n"
    "P01_01_0,P01,P01_01,00:00:01.089,00:00:00.14,00:01:03.37,8,202,open door,open,3,door,3,['door'],[3]\n"
    "P01_01_1,P01,P01_01,00:00:02.629,00:00:04.37,00:00:06.17,262,370,turn on light,turn-on,6,light,114,"
    "\"['light']\",[114]\n"
)


def test_epic_kitchens(tmp_path):
    found = found_in(tmp_path, "EPIC_100_train.csv", EPIC, expect="epic", label="verb")
    assert actions(found) == {"P01_01": [(0.14, 63.37, "id_003"), (4.37, 6.17, "id_006")]}
    assert found.videos["P01_01"].subset == "training"
    found = found_in(tmp_path, "EPIC_100_validation.csv", EPIC, expect="epic", label="noun")
    assert actions(found)["P01_01"][1] == (4.37, 6.17, "id_114")
    assert "give --label verb or --label noun" in found_in(tmp_path, "e.csv", EPIC, expect="epic").left_out[0]
    cut = "\n".join(",".join(line.split(",")[:8]) for line in EPIC.splitlines())
    found = found_in(tmp_path, "EPIC_100_test_timestamps.csv", cut, expect="epic", label="verb")
    assert (actions(found), found.videos["P01_01"].is_known) == ({"P01_01": []}, False)
    info = "video_id,duration,fps,resolution\nP01_01,1652.152817,59.94006,1920x1080\n"
    assert found_in(tmp_path, "i.csv", info, expect="epic-info").durations == {"P01_01": 1652.152817}
    found = found_in(tmp_path, "i.csv", info.replace("1652.152817", '"1,652.15"'), expect="epic-info")
    assert found.left_out == ["i.csv row 2: its duration is '1,652.15': no number of seconds"]


def test_ego4d_takes_primary_labels_in_the_time_of_the_clip(tmp_path):
    def label(name: str, start: float, end: float, *, primary: bool = True) -> dict:
        return {"label": name, "primary": primary, "video_start_time": start, "video_end_time": end}

    one = {"labels": [label('use_"phone", or (tablet)/pc', 301.0, 302.5), label("other", 301, 302, primary=False)]}
    clip = {"video_start_sec": 300.0, "video_end_sec": 780.0}
    clips = [{"clip_uid": "c1", "annotations": [one], **clip}, {"clip_uid": "c2", "annotations": [], **clip}]
    content = {"videos": [{"video_uid": "v", "split": "train", "clips": clips}]}
    found = found_in(tmp_path, "moments_train.json", content, expect="ego4d")
    assert actions(found) == {"c1": [(1.0, 2.5, 'use_"phone", or (tablet)/pc')]}
    assert (found.videos["c1"].duration_seconds, found.videos["c1"].subset) == (480.0, "train")
    assert found.left_out == ["moments_train.json clip c2: it has no primary label"]
    content["videos"][0]["split"] = "test"
    found = found_in(tmp_path, "t.json", content, expect="ego4d")
    assert not found.videos["c2"].is_known


ELAN = """<?xml version="1.0" encoding="UTF-8"?>
<ANNOTATION_DOCUMENT FORMAT="3.0"><HEADER TIME_UNITS="milliseconds">
<MEDIA_DESCRIPTOR MEDIA_URL="file:///C:/me/clip_00.wav" MIME_TYPE="audio/x-wav"/>
<MEDIA_DESCRIPTOR MEDIA_URL="file:///C:/me/clip_00.mp4" MIME_TYPE="video/mp4" TIME_ORIGIN="500"/></HEADER>
<TIME_ORDER><TIME_SLOT TIME_SLOT_ID="ts1" TIME_VALUE="3700"/><TIME_SLOT TIME_SLOT_ID="ts2" TIME_VALUE="9100"/>
<TIME_SLOT TIME_SLOT_ID="ts3"/></TIME_ORDER>
<TIER TIER_ID="actions"><ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a1" TIME_SLOT_REF1="ts1" TIME_SLOT_REF2="ts2">
<ANNOTATION_VALUE>arm </ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION><ANNOTATION>
<ALIGNABLE_ANNOTATION ANNOTATION_ID="a2" TIME_SLOT_REF1="ts2" TIME_SLOT_REF2="ts3">
<ANNOTATION_VALUE>x</ANNOTATION_VALUE>
</ALIGNABLE_ANNOTATION></ANNOTATION></TIER>
<TIER TIER_ID="hand" PARENT_REF="actions"><ANNOTATION><REF_ANNOTATION ANNOTATION_ID="a3" ANNOTATION_REF="a1">
<ANNOTATION_VALUE></ANNOTATION_VALUE></REF_ANNOTATION></ANNOTATION></TIER></ANNOTATION_DOCUMENT>"""


def test_elan(tmp_path):
    found = found_in(tmp_path, "e.eaf", ELAN, expect="elan")
    assert actions(found) == {"clip_00": [(4.2, 9.6, "arm"), (4.2, 9.6, "hand")]}
    assert found.left_out == ["e.eaf tier 'actions' annotation a2: one of its ends is at no time"]
    found = found_in(tmp_path, "e.eaf", ELAN, expect="elan", label="tier", tiers=frozenset({"actions"}))
    assert actions(found) == {"clip_00": [(4.2, 9.6, "actions")]}
    found = found_in(tmp_path, "e.eaf", ELAN, expect="elan", tiers=frozenset({"x"}))
    assert "none of the tiers ['x']; it has ['actions', 'hand']" in found.left_out[0]


def test_the_table_of_elan(tmp_path):
    text = (
        "Begin Time - hh:mm:ss.ms\tEnd Time - hh:mm:ss.ms\tDuration - msec\tactions\thand\n"
        "00:00:03.700\t00:01:09.100\t65400\tarm\t\n00:00:01.000\t00:00:02.000\t1000\tleg\tleft\n"
    )
    found = found_in(tmp_path, "clip_00.txt", text, expect="elan-table")
    assert actions(found) == {"clip_00": [(3.7, 69.1, "arm"), (1.0, 2.0, "leg"), (1.0, 2.0, "left")]}
    text = "Begin Time - msec\tEnd Time - msec\tactions\n3700\t9100\tarm\n3700\tx\tarm\n"
    found = found_in(tmp_path, "clip_00.txt", text, expect="elan-table", label="tier")
    assert actions(found) == {"clip_00": [(3.7, 9.1, "actions")]}
    assert len(found.left_out) == 1


def test_elan_counts_in_milliseconds_only(tmp_path):
    text = ELAN.replace('"milliseconds"', '"PAL-frames"')
    found = found_in(tmp_path, "e.eaf", text, expect="elan")
    assert (actions(found), "has times in PAL-frames" in found.left_out[0]) == ({}, True)


def test_the_table_of_elan_with_a_column_of_tiers(tmp_path):
    text = (
        "Tier\tParticipant\tBegin Time - ss.msec\tEnd Time - ss.msec\tDuration - ss.msec\tAnnotation\n"
        "actions\tme\t3.7\t9.1\t5.4\tarm\nhand\tme\t1\t2\t1\tleft\nhand\tme\t1\t2\t1\tleft\tmore\n"
    )
    found = found_in(tmp_path, "c.txt", text, expect="elan-table")
    assert actions(found) == {"c": [(3.7, 9.1, "arm"), (1.0, 2.0, "left")]}
    assert len(found.left_out) == 1
    found = found_in(tmp_path, "c.txt", text, expect="elan-table", tiers=frozenset({"hand"}), label="tier")
    assert actions(found) == {"c": [(1.0, 2.0, "hand")]}
    found = found_in(tmp_path, "c.txt", text, expect="elan-table", tiers=frozenset({"foot"}))
    assert "none of the tiers ['foot']; it has ['actions', 'hand']" in found.left_out[0]
    found = found_in(tmp_path, "c.txt", text.replace("Participant", "File Path"), expect="elan-table")
    assert "has a column 'File Path', of several videos" in found.left_out[0]
    text = "Begin Time - msec\tEnd Time - msec\tTier 1\n3700\t9100\tarm\n"
    assert actions(found_in(tmp_path, "c.txt", text, expect="elan-table")) == {"c": [(3.7, 9.1, "arm")]}


def test_xml_with_a_document_type_is_refused(tmp_path):
    bomb = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotations>&b;</annotations>'
    for number, encoding in enumerate(("utf-8", "utf-16")):
        path = tmp_path / f"{number}.xml"
        path.write_bytes(bomb.encode(encoding))
        found = Found(Wanted())
        assert read_files([path], format_name=None, found=found) == {}
        assert "it has a document type (<!DOCTYPE>)" in found.left_out[0]


def test_via_reads_options_and_leaves_out_what_is_no_segment(tmp_path):
    def entry(z: list[float], av: dict[str, str], **more: Any) -> dict:
        return {"vid": "1", "flg": 0, "z": z, "xy": [], "av": av, **more}

    attributes = {
        "1": {"aname": "action", "anchor_id": "FILE1_Z2_XY0", "type": 4, "options": {"0": "arm", "1": "leg"}},
        "2": {"aname": "object", "anchor_id": "FILE1_Z1_XY1", "type": 1, "options": {}},
        "3": {"aname": "hands", "anchor_id": "FILE1_Z2_XY0", "type": 2, "options": {"0": "left", "1": "right"}},
    }
    metadata = {
        "1_a": entry([3.7, 9.1], {"1": "0"}),
        "1_b": entry([1, 2], {"1": "_DEFAULT", "3": "0,1"}),
        "1_c": entry([2.5], {"1": "0"}),
        "1_d": entry([], {"1": "0"}),
        "1_e": entry([1], {"2": "cup"}, xy=[2, 1, 1, 5, 5]),
        "1_f": entry([-1, -1], {"1": "1"}),
        "1_g": entry([1, 2], {}),
    }
    attributes["1"]["default_option_id"] = "1"
    content = {
        "project": {"vid_list": ["1"]},
        "attribute": attributes,
        "file": {"1": {"fid": "1", "fname": "clip_00.mp4", "type": 4, "loc": 1, "src": "clip_00.mp4"}},
        "view": {"1": {"fid_list": ["1"]}},
        "metadata": metadata,
    }
    found = found_in(tmp_path, "v.json", content, expect="via")
    expected = [(3.7, 9.1, "arm"), (1.0, 2.0, "leg"), (1.0, 2.0, "left"), (1.0, 2.0, "right")]
    assert actions(found) == {"clip_00": expected}
    assert [line.partition(": ")[2] for line in found.left_out] == [
        "it marks a moment, not a segment",
        "it marks a whole file, not a segment",
        "it marks a region of a picture, not a segment",
        "its segment -1 to -1 s lasts no time",
        "no attribute gives it a label",
    ]
    assert actions(found_in(tmp_path, "v.json", content, expect="via", label="hands"))["clip_00"] == expected[2:]

    metadata["1_a"]["av"] = {"1": "9"}
    assert "its label is ''" in found_in(tmp_path, "v.json", content, expect="via").left_out[0], "no option has it"


CVAT = """<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version><meta><task><size>100</size>
<start_frame>10</start_frame><frame_filter>step=2</frame_filter></task><source>clip_00.mp4</source></meta>
<track id="0" label="arm"><box frame="30" outside="0" keyframe="1"><attribute name="how">fast</attribute></box>
<box frame="50" outside="0" keyframe="1"><attribute name="how">slow</attribute></box>
<box frame="60" outside="1" keyframe="1"><attribute name="how">slow</attribute></box>
<box frame="190" outside="0" keyframe="1"><attribute name="how">fast</attribute></box></track></annotations>"""


def test_cvat_ends_a_run_with_the_first_frame_outside(tmp_path):
    """Frames are the video's; the task ends with frame 10 + 2 * 100."""
    found = found_in(tmp_path, "c.xml", CVAT, expect="cvat", fps=10.0)
    assert actions(found) == {"clip_00": [(3.0, 6.0, "arm"), (19.0, 21.0, "arm")]}
    found = found_in(tmp_path, "c.xml", CVAT, expect="cvat", fps=10.0, label="how")
    assert actions(found) == {"clip_00": [(3.0, 5.0, "fast"), (5.0, 6.0, "slow"), (19.0, 21.0, "fast")]}
    assert "give --fps, or --videos" in found_in(tmp_path, "c.xml", CVAT, expect="cvat").left_out[0]
    found = found_in(tmp_path, "c.xml", CVAT, expect="cvat", measure=lambda video_id: (21.0, 10.0))
    assert actions(found)["clip_00"][0] == (3.0, 6.0, "arm")


@pytest.mark.parametrize(
    ("meta", "first", "end", "expected"),
    [
        ("<start_frame>100</start_frame>", 120, 140, [(12.0, 14.0, "arm")]),
        ("<start_frame>0</start_frame><frame_filter>step=5</frame_filter>", 50, 60, [(5.0, 6.0, "arm")]),
        ("<start_frame>100</start_frame>", 20, 40, []),
    ],
)
def test_cvat_has_applied_start_and_step(tmp_path, meta, first, end, expected):
    text = (
        f"<annotations><meta><task>{meta}</task><source>c.mp4</source></meta><track id='0' label='arm'>"
        f"<box frame='{first}' outside='0'/><box frame='{end}' outside='1'/></track></annotations>"
    )
    found = found_in(tmp_path, "c.xml", text, expect="cvat", fps=10.0)
    assert actions(found) == {"c": expected}
    assert len(found.left_out) == (not expected)


def test_cvat_of_a_project_is_refused_and_true_is_outside(tmp_path):
    path = tmp_path / "c.xml"
    path.write_text(CVAT.replace("</meta>", "<source>other.mp4</source></meta>"))
    assert read_files([path], format_name=None, found=(found := Found(Wanted(fps=10.0)))) == {}
    assert "has tracks of 2 videos" in found.left_out[0]
    found = found_in(tmp_path, "c.xml", CVAT.replace('outside="1"', 'outside="True"'), expect="cvat", fps=10.0)
    assert actions(found)["clip_00"][0] == (3.0, 6.0, "arm")


def test_cvat_does_not_take_the_end_of_a_job_for_the_end_of_its_video(tmp_path):
    text = (
        "<annotations><meta><job><size>9</size><start_frame>5</start_frame></job><source>c.mp4</source></meta>"
        "<track id='0' label='arm'><box frame='20' outside='0'/></track></annotations>"
    )
    found = found_in(tmp_path, "c.xml", text, expect="cvat", fps=10.0)
    assert (actions(found), len(found.left_out)) == ({"c": []}, 1)


def test_cvat_without_the_length_of_its_task(tmp_path):
    text = '<annotations><track id="0" label="arm"><box frame="111" outside="0"/></track></annotations>'
    found = found_in(tmp_path, "clip.xml", text, expect="cvat", fps=30.0)
    assert "it lasts to the end of the video, which the file does not tell; give --videos" in found.left_out[0]
    found = found_in(tmp_path, "clip.xml", text, expect="cvat", measure=lambda video_id: (10.0, 30.0))
    assert actions(found) == {"clip": [(3.7, 10.0, "arm")]}


def test_label_studio(tmp_path):
    """Frames 25 to 48, both included, at 24 per second are the second second."""
    regions = [
        {"type": "timelinelabels", "value": {"ranges": [{"start": 25, "end": 48}], "timelinelabels": ["arm"]}},
        {"type": "labels", "value": {"start": 3.7, "end": 9.1, "labels": ["leg"]}},
        {"type": "videorectangle", "value": {"sequence": [], "labels": ["box"]}},
    ]
    task = {
        "id": 7,
        "data": {"video": "/data/upload/1/0a1b2c3d-clip_00.mp4"},
        "annotations": [{"result": regions}, {"was_cancelled": True, "result": regions}],
        "predictions": [{"result": regions}],
    }
    found = found_in(tmp_path, "l.json", [task], expect="label-studio", fps=24.0)
    assert actions(found) == {"clip_00": [(1.0, 2.0, "arm"), (3.7, 9.1, "leg")]}
    assert found.left_out == ["l.json task 7 region 2: it marks no segment: labels, sequence"]
    task["annotations"].append({"result": regions[:1]})
    found = found_in(
        tmp_path, "l.json", [task, {**task, "data": {"a": "x.mp4", "b": "y.mp4"}}], expect="label-studio", fps=24.0
    )
    assert len(actions(found)["clip_00"]) == 3
    assert list(found.notes) == ["l.json: tasks have several annotations, of several people; all are taken"]
    assert "it shows several videos: x, y" in found.left_out[-1]
    small = {"video": "clip_00.mp4", "tricks": [{"start": 3.7, "end": 9.1, "labels": ["arm"]}], "id": 1}
    small["videoLabels"] = [{"ranges": [{"start": 1, "end": 12}], "timelinelabels": ["leg"]}]
    found = found_in(tmp_path, "m.json", [small], expect="label-studio", fps=24.0)
    assert actions(found) == {"clip_00": [(3.7, 9.1, "arm"), (0.0, 0.5, "leg")]}


BORIS = """\
Observation id,Observation date,Media duration (s),FPS,Subject,Behavior,Modifier #1,Behavior type,Time,Media file name
obs 1,2024-01-01,61.0,25,rat,groom,,START,1.5,a/clip_00.mp4
obs 1,2024-01-01,61.0,25,rat,groom,left,START,2.0,a/clip_00.mp4
obs 1,2024-01-01,61.0,25,rat,sniff,,POINT,2.25,a/clip_00.mp4
obs 1,2024-01-01,61.0,25,rat,groom,left,STOP,3.0,a/clip_00.mp4
obs 1,2024-01-01,61.0,25,rat,groom,,STOP,4.5,a/clip_00.mp4
obs 1,2024-01-01,61.0,25,rat,rest,,STOP,5.0,a/clip_00.mp4
obs 1,2024-01-01,61.0,25,rat,rest,,START,6.0,a/clip_00.mp4
"""


def test_boris_pairs_start_and_stop_of_one_subject_behavior_and_modifier(tmp_path):
    for text in (BORIS, BORIS.replace(",", "\t"), "Observation id\tobs 1\n\n" + BORIS.replace(",", "\t")):
        found = found_in(tmp_path, "b.csv", text, expect="boris")
        assert actions(found) == {"clip_00": [(2.0, 3.0, "groom"), (1.5, 4.5, "groom")]}
        assert found.videos["clip_00"].duration_seconds == 61.0
        assert [line.partition(": ")[2] for line in found.left_out] == [
            "'sniff' is a point event",
            "'rest' stops without a start",
            "'rest' starts and never stops",
        ]


def test_boris_with_a_time_offset_says_no_sure_time(tmp_path):
    text = BORIS.replace("Media duration (s)", "Time offset (s)")
    found = found_in(tmp_path, "b.csv", text, expect="boris")
    assert not any(actions(found).values())
    assert "it has a time offset of 61.0 s" in found.left_out[0]


def test_boris_aggregated_events(tmp_path):
    text = (
        "Observation id,Source,Total length,Subject,Behavior,Behavioral category,Behavior type,Start (s),Stop (s)\n"
        "obs,player #1:/v/clip_00.mp4,61.0,rat,groom,care,STATE,1.5,4.5\n"
        "obs,player #1:/v/clip_00.mp4,61.0,rat,sniff,food,POINT,2,2\n"
        "o2,player #1:/v/a.mp4;/v/b.mp4,61.0,rat,groom,care,STATE,1.5,4.5\n"
    )
    found = found_in(tmp_path, "b.csv", text, expect="boris", label="category")
    assert actions(found) == {"clip_00": [(1.5, 4.5, "care")]}
    assert "several media files" in found.left_out[0]
    assert "'sniff' is a point event" in found.left_out[1]


def test_boris_between_semicolons_has_decimal_commas(tmp_path):
    """As a spreadsheet of many countries saves it; elsewhere 12,345 may be thousands, and is left out by name."""
    table = "Observation id;Media file name;Behavior;Behavior type;Start (s);Stop (s)\nobs;a.mp4;groom;STATE;{}\n"
    assert actions(found_in(tmp_path, "b.csv", table.format("2,125;12,345"), expect="boris")) == {
        "a": [(2.125, 12.345, "groom")]
    }
    tabs = table.format("2,125;12,345").replace(";", "\t")
    assert "decimals or thousands?" in found_in(tmp_path, "b.tsv", tabs, expect="boris").left_out[0]


def test_boris_aggregated_events_of_several_media_files_in_one_observation(tmp_path):
    text = (
        "Observation id,Media file name,Behavior,Behavior type,Start (s),Stop (s)\n"
        "obs,a.mp4,groom,STATE,1,2\nobs,b.mp4,groom,STATE,63,64\no2,c.mp4,groom,STATE,1,2\n"
        "o2,c.mp4,groom, and more,STATE,1,2\n"
    )
    found = found_in(tmp_path, "b.csv", text, expect="boris")
    assert actions(found) == {"c": [(1.0, 2.0, "groom")]}
    assert [line.partition(": ")[2][:30] for line in found.left_out] == [
        "it has 7 cells, more than the ",
        "its observation has several me",
        "its observation has several me",
    ]


def test_boris_project(tmp_path):
    events = [[1.5, "rat", "groom", "", ""], [2.0, "rat", "sniff", "", ""], [4.5, "rat", "groom", "", ""], [5, "rat"]]
    content = {
        "behaviors_conf": {
            "0": {"code": "groom", "type": "State event"},
            "1": {"code": "sniff", "type": "Point event"},
        },
        "observations": {
            "one": {
                "file": {"1": ["clip_00.mp4"], "2": []},
                "media_info": {"length": {"clip_00.mp4": 61.0}},
                "events": events,
            },
            "two": {"file": {"1": ["a.mp4", "b.mp4"]}, "events": events},
        },
    }
    found = found_in(tmp_path, "p.boris", content, expect="boris-project")
    assert actions(found) == {"clip_00": [(1.5, 4.5, "groom")]}
    assert found.videos["clip_00"].duration_seconds == 61.0
    assert len(found.left_out) == 3


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("video,start,end,label\nclip.mp4,3.5,69.25,run\n", {}),
        ("\ufeffVideo Name;Start (s);End (s);Class\nclip.mp4;3,5;69,25;run\n", {}),
        ("clip.mp4\t00:03.5\t00:01:09.250\trun\n", {}),
        ("clip,00:03,00:09,jump\nclip,x,9,run\n# a comment\nclip,3.5,69.25,run\n", {}),
        ("clip,run,3.5,69.25\n", {}),
        ("clip\t\t00:00:03.500\t00:01:09.250\t00:01:05.750\trun\n", {}),
        ("label,youtube_id,start_ms,end_ms\nrun,clip,3500,69250\n", {}),
        ("video,startFrame,endFrame,label\nclip,35,692.5,run\n", {"fps": 10.0}),
        ("video,start,end,label\nclip,35,692.5,run\n", {"fps": 10.0}),
        ("video,start,duration,label\nclip,3.5,65.75,run\n", {}),
        ("video,start_frame_number,end_frame_number,label\nclip,35,692.5,run\n", {"fps": 10.0}),
        ("video,startframe,endframe,label\nclip,35,692.5,run\n", {"fps": 10.0}),
        ("# video,label,frame start,frame end\nclip,run,35,692.5\n", {"fps": 10.0}),
        ("video,start_frame,end_frame,label,fps\nclip,70,1385,run,20\n", {}),
        ("video,start_frame,end_frame,label,Frame Rate\nclip,35,692.5,run,10\n", {"fps": 10.0}),
        ("video,start_frame,end_frame,start_sec,end_sec,label\nclip,35,692.5,3.5,69.25,run\n", {"fps": 10.0}),
        ("video,start,end,start_frame,end_frame,label\nclip,3.5,69.25,35,692.5,run\n", {"fps": 10.0}),
        ("video,start_s,end_s,label\nclip,3.5,69.25,run\n", {"fps": 10.0}),
        ("video,start (min),end_min,label\nclip,0.05833333333333333,1.15416666666666667,run\n", {}),
        ("video,start_h,endHours,label\nclip,0.00097222222222222,0.01923611111111111,run\n", {}),
        ("video,start (\u00b5s),end_us,label\nclip,3500000,69250000,run\n", {}),
        ("video,startms,endms,label\nclip,3500,69250,run\n", {}),
        ("video,type,type_idx,start,end,startFrame,endFrame\nclip,run,7,3.5,69.25,35,692\n", {}),
        ('video,start,end,label\nclip,3.5,69.25,"run"\nclip,9,3,run\nclip,3,3,run\nclip,1,2,\n,1,2,run\n', {}),
    ],
)
def test_tables(tmp_path, text, options):
    found = found_in(tmp_path, "list.csv", text, expect="csv", **options)
    assert found.videos["clip"].actions[-1] == (3.5, 69.25, "run")
    assert len(found.left_out) == {"jump": 1, ",9,3,": 4}.get(next((k for k in ("jump", ",9,3,") if k in text), ""), 0)


@pytest.mark.parametrize(
    "header",
    [
        "Film,Anfang,Ende,Klasse",
        "video,debut,duration,classe",
        "video,start_m,end_m,label",
        "video,start_min_sec,end_min_sec,label",
        "narration_id,participant_id,video_id,start_frame,stop_frame,narration,verb,verb_class",
    ],
)
def test_a_header_that_is_not_understood_is_refused(tmp_path, header):
    path = tmp_path / "l.csv"
    path.write_text(f"{header}\n{'clip,' * (header.count(',') - 2)}3.5,69.25,run\n")
    found = Found(Wanted(fps=10.0))
    assert read_files([path], format_name=None, found=found) == {}
    assert "has no column for" in found.left_out[0]
    assert "start: start, starttime" in found.left_out[0]


@pytest.mark.parametrize("columns", ["start_frame_number,end_frame_number", "startframe,endframe"])
def test_frames_ask_for_their_rate(tmp_path, columns):
    text = f"video,{columns},label,fps\nclip,35,690,run,25\n"
    assert "its rate is 25, and --fps says 30" in found_in(tmp_path, "l.csv", text, expect="csv", fps=30.0).left_out[0]
    found = found_in(tmp_path, "l.csv", f"video,{columns},label\nclip,35,690,run\n", expect="csv")
    assert "give --fps" in found.left_out[0]
    found = found_in(tmp_path, "l.csv", f"video,{columns},label\nclip,00:01:02,00:01:03,run\n", expect="csv")
    assert found.left_out == ["l.csv row 2: it has a clock's time in a column of frames"]


def test_frames_of_a_video_without_one_rate_are_left_out(tmp_path):
    text = "video,start_frame,end_frame,label\neven,30,45,run\nuneven,30,45,run\n"
    measure = {"even": (2.0, 30.0), "uneven": (2.0, None)}.get
    found = found_in(tmp_path, "l.csv", text, expect="csv", measure=measure)
    assert actions(found)["even"] == [(1.0, 1.5, "run")]
    assert "row 3: its times are frames, and those of its file come unevenly" in found.left_out[0]
    box = '<box frame="0" outside="0"/>'
    meta = "<meta><source>uneven.mp4</source></meta>"
    found = found_in(
        tmp_path,
        "c.xml",
        f'<annotations>{meta}<track id="0" label="run">{box}</track></annotations>',
        expect="cvat",
        measure=measure,
    )
    assert "come unevenly" in found.left_out[0]


@pytest.mark.parametrize("line", ["sep=;", '"sep=;"', "SEP=;"])
def test_a_first_line_that_tells_excel_the_separator_is_none_of_the_table(tmp_path, line):
    found = found_in(tmp_path, "l.csv", f"{line}\nvideo;start;end;label\na;1,5;2,5;run, fast\na;x;2;run", expect="csv")
    assert actions(found) == {"a": [(1.5, 2.5, "run, fast")]}
    assert "l.csv row 4" in found.left_out[0]


def test_behind_such_a_line_a_cell_may_have_lines(tmp_path):
    text = 'sep=;\nvideo;start;end;label;note;by\na;1;2;run;"one\ntwo; three; four";me\n'
    assert actions(found_in(tmp_path, "l.csv", text, expect="csv")) == {"a": [(1.0, 2.0, "run")]}


@pytest.mark.parametrize("columns", ["start_frame,end", "start,end_ms", "start_min,duration"])
def test_a_unit_of_one_time_only_is_refused(tmp_path, columns):
    found = found_in(tmp_path, "l.csv", f"video,{columns},label\nclip,3,6,run\n", expect="csv", fps=10.0)
    assert "has a unit, the other none; write both" in found.left_out[0]


def test_only_times_have_units(tmp_path):
    text = "video,clip_ms,video_frames,event_s,start,end,label\nclip,9,9,9,1,2,run\n"
    assert actions(found_in(tmp_path, "l.csv", text, expect="csv")) == {"clip": [(1.0, 2.0, "run")]}


def test_rows_that_do_not_fit_a_table_are_named(tmp_path):
    text = (
        'video,start,end,label\nclip,3,5,69,25,run\nclip,1,2,open, close\nclip,1,2,"open,\n close",,\n'
        "#clip,1,2,run\n# a comment, of two cells\nclip,01:05:12,01:05:13,run\n"
    )
    found = found_in(tmp_path, "l.csv", text, expect="csv")
    assert actions(found) == {"clip": [(1.0, 2.0, "open, close"), (3912.0, 3913.0, "run")]}
    assert [line.partition(": ")[2][:20] for line in found.left_out] == [
        "it has 6 cells, more",
        "it has 5 cells, more",
        "it begins with #: a ",
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('video,start,end,label\na,1,2,"run\na,3,4,jump\na,5,6,hop\n', "row 2 holds whole rows: a quote opens"),
        ('a,0,1,x\na,1,2,"run\na,3,4,"jump"\na,5,6,hop\n', "row 2 holds whole rows: a quote opens"),
        ("clip,3,5,69,25,run\n", "nothing tells which of the numbers ['3', '5', '69', '25', 'run'] are times"),
        ("tier,person,1.5,2.5,1.0,run\n", "nothing tells which of ['person', 'run'] is the label"),
        ("clip.mp4,1.5,2.5,train,run\n", "nothing tells which of ['train', 'run'] is the label"),
        ('video,start,end,label\na,"1,500","2,250",run\n', "are times such as '1,500' decimals or thousands?"),
        (
            "video;start;end;label\na;1.500;2250,5;run\n",
            "are times such as '2250,5' and '1.500' decimals or thousands?",
        ),
        ("video,start,end,label,label\na,1,2,run,7\n", "has two columns for label of one name"),
    ],
)
def test_a_table_that_can_be_read_in_two_ways_is_refused(tmp_path, text, reason):
    path = tmp_path / "l.csv"
    path.write_text(text)
    found = Found(Wanted())
    assert read_files([path], format_name=None, found=found) == {}
    assert reason in found.left_out[0]


def test_a_name_with_a_suffix_is_the_video_wherever_it_stands(tmp_path):
    for text in ("run,clip.mp4,1,2\n", "0,clip.mp4,1,2,run\n"):
        assert actions(found_in(tmp_path, "l.csv", text, expect="csv")) == {"clip": [(1.0, 2.0, "run")]}


def test_whole_numbers_that_may_be_frames_are_told(tmp_path):
    found = found_in(tmp_path, "l.csv", "video,start,end,label\na,300,4500,run\n", expect="csv")
    assert "its times are whole numbers, to 4500, and taken for seconds" in next(iter(found.notes))
    found = found_in(tmp_path, "l.csv", "video,start,end,label,fps\na,25,50,run,25\n", expect="csv")
    assert "its times are whole numbers, to 50, and taken for seconds" in next(iter(found.notes))


def test_the_length_of_a_video_has_a_unit_too(tmp_path):
    text = "video,start,end,label,video_duration_ms\na,1,2,run,61500\n"
    assert found_in(tmp_path, "l.csv", text, expect="csv").videos["a"].duration_seconds == 61.5
    text = "video,start,end,label,video_length_frames\na,1,2,run,615\n"
    one = found_in(tmp_path, "l.csv", text, expect="csv").videos["a"]
    assert (one.duration_seconds, one.facts) == (None, {"frame": 615})


def test_a_table_tells_subsets_and_lengths(tmp_path):
    text = "video,start,end,label,split,video_duration\na,1,2,run,Val,61.5\n"
    one = found_in(tmp_path, "l.csv", text, expect="csv").videos["a"]
    assert (one.subset, one.duration_seconds) == ("val", 61.5)


def test_what_no_format_knows_is_left_out_and_named(tmp_path):
    for name, content, reason in (
        ("a.json", "{}", "its format is not known; known: activitynet"),
        ("b.csv", "a,b\n1,2\n", "its format is not known"),
        ("c.txt", "", "its format is not known"),
        ("d.json", '{"a": ', "not usable JSON"),
        ("e.xml", "<a><b></a>", "not usable XML"),
        ("f.csv", b"caf\xe9,1,2,run", "not text in UTF-8"),
    ):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        found = Found(Wanted())
        assert read_files([path], format_name=None, found=found) == {}
        assert reason in found.left_out[0]
    with pytest.raises(ValueError, match="unknown format 'xls'; known: activitynet, "):
        read_files([], format_name="xls", found=found)
    read_files([tmp_path / "b.csv"], format_name="elan", found=found)
    assert found.left_out[-1].endswith("it is not ELAN's .eaf")


def test_every_row_has_a_name_for_people() -> None:
    assert all(row.about for row in FORMATS.values())
