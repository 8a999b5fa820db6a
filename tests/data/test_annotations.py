import json

import pytest

from re2tal.data.building.annotations import read_annotations, read_frame_rates, read_video_ids
from re2tal.structures import Action, VideoRecord


def entry(*segments, duration=10.0, subset="training", label="run"):
    annotations = [{"segment": list(segment), "label": label} for segment in segments]
    return {"subset": subset, "duration": duration, "annotations": annotations}


def read(tmp_path, database, **options):
    path = tmp_path / "a.json"
    path.write_text(database if isinstance(database, str) else json.dumps({"database": database}))
    return read_annotations(path, **options)


def refuses(tmp_path, message, database, **options):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, database, **options)


def test_the_activitynet_layout(tmp_path):
    found = read(
        tmp_path,
        {
            "--abc_DEF01": {**entry((1, 2.5), (0, 10)), "resolution": "320x240", "url": "..."},
            "b": entry((3, 4), subset="validation", label="jump"),
            "c": entry(subset="testing"),
        },
    )
    assert found.classes == ("jump", "run")
    assert sorted(found.subsets) == ["testing", "training", "validation"]
    assert found.subset("Training") == (
        VideoRecord("--abc_DEF01", "training", 10.0, (Action(1.0, 2.5, "run"), Action(0.0, 10.0, "run"))),
    )
    assert found.subset("testing")[0].actions == ()
    assert found.notes == ()


def test_the_thumos_layout_of_opentad(tmp_path):
    video = {**entry((0.2, 1.1), label="Diving"), "frame": 300}
    video["annotations"].append({"segment": [3, 4], "label": "Ambiguous"})
    found = read(tmp_path, {"video_validation_0000051": video})
    assert found.classes == ("Diving",)
    assert found.notes == ('1 segments labelled "Ambiguous" skipped',)
    assert found.subset("training")[0].actions == (Action(0.2, 1.1, "Diving"),)


def test_the_thumos_layout_of_actionformer(tmp_path):
    action = {"label": "Diving", "segment": [1.0, 2.0], "segment(frames)": [30, 60], "label_id": 7}
    found = read(
        tmp_path, {"video_test_0000004": {"subset": "Test", "duration": 33.8, "fps": 30.0, "annotations": [action]}}
    )
    assert found.subset("test") == (VideoRecord("video_test_0000004", "test", 33.8, (Action(1.0, 2.0, "Diving"),)),)


def test_the_thumos_layout_of_vsgn_takes_the_duration_from_the_video(tmp_path):
    database = {"v": {"subset": "train", "annotations": [{"segment": ["1.0", "2.5"], "label": "Diving"}]}}
    found = read(tmp_path, database, duration_of={"v": 12.5}.__getitem__)
    assert found.subset("train") == (VideoRecord("v", "train", 12.5, (Action(1.0, 2.5, "Diving"),)),)
    refuses(tmp_path, r"database\.v: duration is None: give the video's length in seconds", database)


def test_a_duration_follows_from_frames_and_rate(tmp_path):
    video = {"subset": "train", "frame": 250, "fps": 25, "annotations": [{"segment": [0, 1], "label": "a"}]}
    assert read(tmp_path, {"v": video}).subset("train")[0].duration_seconds == 10.0


def test_a_segment_a_little_longer_than_its_video_is_cut_and_counted(tmp_path):
    found = read(tmp_path, {"v": entry((1, 10.9), (9.5, 10)), "long": entry((0, 101.9), duration=100)})
    assert found.notes == ("2 segments that end a little after their video cut to its end",)
    assert found.subset("training")[0].actions[0] == Action(1.0, 10.0, "run")
    assert found.subset("training")[1].actions[0] == Action(0.0, 100.0, "run")


@pytest.mark.parametrize(
    ("segment", "fault"),
    [
        ([5, 3], r"segment is \[5, 3\]: it is reversed; correct it, or use --invalid-segments drop"),
        ([3, 3], "it lasts no time"),
        ([-1, 3], "it starts before the video"),
        ([3, 11.1], "the video lasts 10 s"),
        ([10.2, 10.5], "the video lasts 10 s"),
        ([1], r"give \[start, end\] in seconds"),
        ([1, 2, 3], r"give \[start, end\] in seconds"),
        ([1, None], r"give \[start, end\] in seconds"),
        ([1, "two"], r"give \[start, end\] in seconds"),
        ([1, "nan"], r"give \[start, end\] in seconds"),
        ([1, True], r"give \[start, end\] in seconds"),
        ([1, 10**400], r"give \[start, end\] in seconds"),
        ("1-2", r"give \[start, end\] in seconds"),
    ],
)
def test_a_bad_segment_is_named_with_its_place_and_remedy(tmp_path, segment, fault):
    video = entry((0, 1))
    video["annotations"].append({"segment": segment, "label": "run"})
    refuses(tmp_path, rf"a\.json: database\.v\.annotations\[1\]: .*{fault}", {"v": video})


def test_invalid_segments_can_be_dropped_and_are_counted(tmp_path):
    found = read(tmp_path, {"v": entry((0, 1), (5, 3), (4, 4), (0, 99))}, invalid_segments="drop")
    assert found.subset("training")[0].actions == (Action(0.0, 1.0, "run"),)
    assert "3 invalid segments dropped" in found.notes


@pytest.mark.parametrize(
    ("video_id", "fault"),
    [
        ("a/b", "a slash would make it a folder"),
        ("..\\a", "a slash would make it a folder"),
        ("..", "it names no video"),
        ("", "it names no video"),
        ("a\nb", r"database\.'a\\nb': id is .*: it holds a control character"),
        ("a\udcff", "it holds a control character, or bytes that are not UTF-8"),
        ("x" * 241, "it has 241 bytes, more than 240"),
    ],
)
def test_ids_that_cannot_be_names_of_files_are_refused(tmp_path, video_id, fault):
    refuses(tmp_path, fault, {video_id: entry((0, 1))})


def test_ids_are_what_people_call_their_files(tmp_path):
    names = ["my video.v2", "ä b", "録画 1", "100%", "v_a", "a"]
    found = read(tmp_path, {f"{name}.mp4" if " " in name else name: entry((0, 1)) for name in names})
    assert [record.video_id for record in found.subset("training")] == names
    refuses(tmp_path, "'a\u0308.mp4' is the same video", {"a\u0308.mp4": entry((0, 1)), "ä": entry((0, 1))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subset": None}, "subset is None"),
        ({"subset": "../x"}, "subset is '../x'"),
        ({"duration": 0}, "duration is 0: give the video's length in seconds"),
        ({"duration": -3.0}, r"duration is -3\.0"),
        ({"duration": "long"}, "duration is 'long'"),
        ({"annotations": None}, "annotations is None: give a list"),
        ({"annotations": ["run"]}, r"annotations\[0\]: annotation is 'run': give an object"),
        ({"annotations": [{"segment": [0, 1]}]}, "label is None: give a class name"),
        ({"annotations": [{"segment": [0, 1], "label": 3}]}, "label is 3"),
        ({"annotations": [{"segment": [0, 1], "label": "a\nb"}]}, "printable"),
        ({"annotations": [{"segment": [0, 1], "label": "run\u202eraw"}]}, "printable"),
    ],
)
def test_a_bad_entry_is_named_with_its_key_and_value(tmp_path, change, message):
    refuses(tmp_path, rf"database\.v.*{message}", {"v": {**entry((0, 1)), **change}})


def test_an_entry_that_is_no_object_is_refused(tmp_path):
    refuses(tmp_path, "entry is 3", {"v": 3})


def test_problems_are_reported_together_and_the_rest_is_counted(tmp_path):
    refuses(
        tmp_path,
        r"(?s)a\.json has 25 problems:\n  database\.v0\..*database\.v19\..*and 5 more$",
        {f"v{i}": entry((2, 1)) for i in range(25)},
    )


def test_labels_must_be_among_given_classes_whose_order_is_kept(tmp_path):
    database = {"v": entry((0, 1), label="walk")}
    refuses(
        tmp_path,
        "label is 'walk': it is not among the classes; .*; the classes are jump, run$",
        database,
        classes=["run", "jump"],
    )
    refuses(
        tmp_path,
        r"(?s)2 problems:\n  database\.v\.[^:]*: label is 'walk'[^\n]*\n.*label is 'walk'[^\n]*\nthe classes are run$",
        {"v": entry((0, 1), label="walk"), "w": entry((0, 1), label="walk")},
        classes=["run"],
    )
    assert read(tmp_path, database, classes=["walk", "jump"]).classes == ("walk", "jump")
    refuses(tmp_path, "names 2 classes, 1 different", database, classes=["walk", "walk"])


def test_a_subset_without_videos_is_an_error_that_lists_those_there_are(tmp_path):
    found = read(tmp_path, {"v": entry((0, 1))})
    with pytest.raises(ValueError, match=r"no video belongs to subset 'x'; the annotation file has \['training'\]"):
        found.subset("x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"database": {', "line 1 column"),
        ('{"database": {"v": {"duration": NaN}}}', "NaN"),
        ('{"database": {"v": {"duration": Infinity}}}', "Infinity"),
        ('{"database": {"v": {"duration": 1e999, "subset": "a", "annotations": []}}}', "duration is inf"),
        ('{"database": {"v": {}, "v": {}}}', "'v' appears twice"),
        ('{"database": ' + "[" * 100_000, "nested too deeply"),
        ("[]", r'no "database" object .* "label": ...}\]}}}; if another tool wrote it, convert it'),
        ('{"database": {}}', 'no "database" object'),
        ('{"database": {"v": {"duration": 3, "subset": "a", "annotations": []}}}', "no video has an annotation"),
    ],
    ids=lambda text: text[:30],
)
def test_a_file_that_is_not_an_annotation_file_is_refused(tmp_path, text, message):
    refuses(tmp_path, rf"(?s)a\.json.*{message}", text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json is not a file"):
        read_annotations(tmp_path / "nowhere.json")


def test_an_entry_without_annotations_is_a_video_of_which_no_action_is_known(tmp_path):
    """OpenTAD's EPIC-Kitchens and Ego4D files write test videos so."""
    found = read(tmp_path, {"v": entry((0, 1)), "t": {"subset": "test", "duration": 100.0, "frame": 300}})
    assert found.subset("test") == (VideoRecord("t", "test", 100.0, ()),)
    assert found.notes == ("1 entries have no annotations: videos of which no action is known",)


def test_a_duration_of_zero_is_no_duration(tmp_path):
    database = {"v": entry((0, 1), duration=0)}
    assert read(tmp_path, database, duration_of={"v": 12.5}.__getitem__).subset("training")[0].duration_seconds == 12.5
    database["v"] |= {"frame": 250, "fps": 25}
    assert read(tmp_path, database).subset("training")[0].duration_seconds == 10.0


def test_the_outer_object_may_be_missing(tmp_path):
    found = read(tmp_path, json.dumps({"v": entry((0, 1)), "w": entry((1, 2), subset="validation")}))
    assert sorted(found.subsets) == ["training", "validation"]


def test_ids_lose_the_suffix_of_their_file_and_may_not_meet(tmp_path):
    found = read(tmp_path, {"a.mp4": entry((0, 1)), "b.MKV": entry((0, 1)), "c": entry((0, 1))})
    assert [record.video_id for record in found.subset("training")] == ["a", "b", "c"]
    refuses(tmp_path, r"id is 'a\.mp4': 'a' is the same video", {"a": entry((0, 1)), "a.mp4": entry((0, 1))})


def test_frame_rates_are_those_of_the_ids_that_are_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"a.mp4": {"subset": "x", "fps": 25}, "b": {"subset": "x", "frame": 60, "duration": 2}}))
    assert read_frame_rates(path) == {"a": 25.0, "b": 30.0}


NFC, NFD = "caf\u00e9", "cafe\u0301"


def test_labels_that_look_alike_are_named_before_anything_is_built(tmp_path):
    database = {
        "v": entry((0, 1), (1, 2), label="Diving"),
        "w": entry((0, 1), label="Diving "),
        "x": entry((0, 1), label="diving"),
        "y": entry((0, 1), label=NFC),
        "z": entry((0, 1), label=NFD),
    }
    refuses(
        tmp_path,
        r"(?s)labels 'Diving' \(2 times\), 'Diving ' \(1 times\) and 'diving' \(1 times\) differ only by case, space "
        r"or Unicode form: correct them, or use --fix-labels\n.*'caf\\xe9' \(1 times\) and 'cafe\\u0301' \(1 times\)",
        database,
    )
    found = read(tmp_path, database, fix_labels=True)
    assert found.classes == ("Diving", NFC)
    assert found.notes == (
        "label 'Diving ' read as 'Diving'",
        "label 'diving' read as 'Diving'",
        r"label 'cafe\u0301' read as 'café'",
    )


def test_a_label_in_another_spelling_than_its_class_takes_that_of_the_class(tmp_path):
    database = {"v": entry((0, 1), (1, 2), label="high jump")}
    refuses(tmp_path, "spelled 'HighJump'; correct it, or use --fix-labels", database, classes=["HighJump"])
    assert read(tmp_path, database, classes=["HighJump"], fix_labels=True).classes == ("HighJump",)


def test_segments_that_are_there_twice_are_named_and_kept(tmp_path):
    found = read(tmp_path, {"v": entry((0, 1), (0, 1.0), (1, 2))})
    assert len(found.subset("training")[0].actions) == 3
    assert found.notes == ("1 segments are there twice, and are kept: v 0 to 1 s 'run'",)


def test_a_subset_is_found_by_its_other_name(tmp_path):
    found = read(tmp_path, {"v": entry((0, 1), subset="train"), "w": entry((0, 1), subset="Val")})
    assert [record.video_id for record in found.subset("training")] == ["v"]
    assert [record.video_id for record in found.subset("validation")] == ["w"]


def test_two_names_of_one_subset_are_told(tmp_path):
    subsets = ("train", "Training", "TRAIN", "test", "validation")
    found = read(tmp_path, {f"v{number}": entry((0, 1), subset=one) for number, one in enumerate(subsets)})
    assert found.notes == ("subsets 'train' and 'training' are one by their names, and stay two: give them one name",)


def test_a_list_of_ids_may_begin_with_a_byte_order_mark_and_is_utf_8(tmp_path):
    path = tmp_path / "blocked.txt"
    path.write_bytes("a\nb\r\nc\x0b\u2028d\n".encode("utf-8-sig"))
    assert read_video_ids(path) == {"a", "b", "c\x0b\u2028d"}
    path.write_bytes("a\nb\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"blocked\.txt is not UTF-8 text: .*; save it as UTF-8"):
        read_video_ids(path)


def test_a_list_of_ids_is_json_by_its_suffix_in_capitals_too(tmp_path):
    path = tmp_path / "blocked.JSON"
    path.write_text('["a", "b"]')
    assert read_video_ids(path) == {"a", "b"}
