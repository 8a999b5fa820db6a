"""Which files of a folder are videos."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from re2tal.runs.video_files import find_videos


def test_links_to_folders_are_followed_as_builds_follow_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("elsewhere/a.mp4", "videos/b.MOV", "videos/.hidden/c.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "videos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "videos" / "round").symlink_to(tmp_path / "videos")
    with caplog.at_level(logging.WARNING):
        assert list(find_videos([tmp_path / "videos"], recursive=True).names.values()) == ["b", "a"]
    assert "round is not looked at: by a link it is the folder" in caplog.text
    assert list(find_videos([tmp_path / "videos"]).names.values()) == ["b"]
