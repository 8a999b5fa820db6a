"""What a video is called, by everyone alike: annotation files, folders of videos, clips and features, tars, results.

A video's id is the name of its file without suffix, as its owner wrote it: spaces, dots and any script may be in it.

    my video.v2.mp4  ->  id "my video.v2"  ->  key of its tar members "my%20video%2Ev2"

Two names are one video where they differ only by the suffix of a media file or by Unicode form. To a score, also where
one of them has the `v_` that ActivityNet's packages put before ids.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable
from urllib.parse import quote

VIDEO_SUFFIXES = (
    *(".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2ts", ".flv", ".wmv"),
    *(".asf", ".3gp", ".ogv"),
)
MEDIA_SUFFIXES = (*VIDEO_SUFFIXES, ".npy", ".npz")
"""What ids in annotations and results may end in, though the id ends before it."""
MAX_BYTES = 240
"""Of an id in UTF-8: with a suffix it is a file name on every system."""
MAX_KEY = 80
"""Characters of a tar member's key: with its suffix it fits a plain tar header."""

_CONTROLS = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's control characters, halves of characters (of names that are not UTF-8), and line breaks."""


def id_fault(video_id: str) -> str:
    """Why this can't be the id of a video, with the remedy; empty where it can."""
    if not video_id.strip() or video_id in (".", ".."):
        return "it names no video"
    if "/" in video_id or "\\" in video_id:
        return "a slash would make it a folder: give the file's name alone"
    if not video_id.isprintable() and any(unicodedata.category(one) in _CONTROLS for one in video_id):
        return "it holds a control character, or bytes that are not UTF-8: rename it"
    if (size := len(video_id.encode())) > MAX_BYTES:
        return f"it has {size} bytes, more than {MAX_BYTES}: rename it"
    return ""


def file_key(video_id: str) -> str:
    """The id in letters, digits, `_`, `-` and `%`: what tar members are called, as their key ends at the first dot.

    Others are escaped as in addresses, so `urllib.parse.unquote` gives the id back, and no two ids share a key. Where
    that would take more than `MAX_KEY` characters, the key ends in a digest of the id; the record beside it has all.
    """
    key = quote(video_id, safe="").replace(".", "%2E").replace("~", "%7E")
    if len(key) <= MAX_KEY:
        return key
    digest = hashlib.sha256(video_id.encode()).hexdigest()[:32]
    return f"{key[: MAX_KEY - len(digest) - 2]}%-{digest}"


def plain_id(name: str) -> str:
    """An id as files and entries share it: without the suffix of a media file."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in MEDIA_SUFFIXES else name


def composed(name: str) -> str:
    """The name in the Unicode form that all its forms share: a file system may give another than was written."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def match_ids(given: Collection[str], known: Iterable[str]) -> dict[str, str]:
    """Ids of `given` that are not known as they stand -> the known id that differs only in suffix, prefix or form.

    Left out where two known ids, or two given ones, come into question.
    """
    known = set(known)
    strangers = [one for one in given if one not in known]
    if not strangers:
        return {}
    by_stem: dict[str, list[str]] = {}
    for one in known:
        by_stem.setdefault(_stem(one), []).append(one)
    takers = Counter(map(_stem, given))
    found = {one: by_stem.get(_stem(one), []) for one in strangers if takers[_stem(one)] == 1}
    return {one: candidates[0] for one, candidates in found.items() if len(candidates) == 1}


def _stem(video_id: str) -> str:
    return composed(plain_id(video_id)).removeprefix("v_")
