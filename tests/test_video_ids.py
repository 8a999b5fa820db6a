"""Ids are what people call their files; keys are what tars can carry; between the two nothing is lost."""

import string
from urllib.parse import unquote

import pytest

from re2tal.video_ids import MAX_KEY, file_key, id_fault, match_ids, plain_id

NAMES = [
    "my video.v2",
    "a.b",
    "a_b",
    "a%2Eb",
    "~",
    "100%",
    "%",
    "café",
    "cafe\u0301",
    "録画 1",
    "a b",
    "a+b",
    "🎬",
    "A",
    "a",
]


def test_keys_are_safe_differ_and_give_the_name_back():
    keys = [file_key(name) for name in NAMES]
    assert [unquote(key) for key in keys] == NAMES
    assert len(set(keys)) == len(NAMES)
    assert set("".join(keys)) <= set(string.ascii_letters + string.digits + "_-%")
    assert file_key("my video.v2") == "my%20video%2Ev2"
    assert file_key("v_-abc_0123456789") == "v_-abc_0123456789"  # as older folders have them


def test_long_names_have_short_keys_of_their_own():
    names = ["録" * 40 + str(number) for number in range(100)] + ["x" * 200 + str(number) for number in range(100)]
    keys = {file_key(name) for name in names}
    assert len(keys) == 200
    assert max(map(len, keys)) == MAX_KEY
    assert not any(id_fault(name) for name in names)


@pytest.mark.parametrize(
    ("name", "plain"),
    [("a.mp4", "a"), ("a.MKV", "a"), ("my video.v2.mp4", "my video.v2"), ("my video.v2", "my video.v2"), (".mp4", "")],
)
def test_a_media_suffix_is_no_part_of_an_id(name, plain):
    assert plain_id(name) == plain


def test_ids_match_in_any_unicode_form_with_and_without_suffix():
    assert match_ids(["cafe\u0301.mp4", "x y"], ["café", "v_x y"]) == {"cafe\u0301.mp4": "café", "x y": "v_x y"}
    assert match_ids(["cafe\u0301", "café"], ["café"]) == {}
