"""Files to be written: links, folders, pipes."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from re2tal.files import is_stdout, output_file
from re2tal.strict_json import read_json, write_json


def test_an_output_that_is_a_link_stays_one_and_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("{}")
    for name, leads_to in (("link.json", "there.json"), ("dangling.json", "new/b.json")):
        link = tmp_path / name
        link.symlink_to(leads_to)
        write_json(output_file(link, option="--json"), {"a": 1})
        assert link.is_symlink()
        assert read_json(link) == {"a": 1}
    assert output_file(tmp_path / "there.json", option="--json") == tmp_path / "there.json"


def test_what_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--json is .*, a folder; give the name of a file"):
        output_file(tmp_path, option="--json")
    with pytest.raises(ValueError, match=r"--out is .*file/a\.json, and cannot be written: Not a directory; give ano"):
        output_file(tmp_path / "file" / "a.json", option="--out")
    for leads_to in ("nowhere", "link"):
        (tmp_path / "link").symlink_to(leads_to)
        with pytest.raises(ValueError, match=r"--out is .*link/a\.json, and cannot be written: "):
            output_file(tmp_path / "link" / "a.json", option="--out")
        (tmp_path / "link").unlink()
    output_file(tmp_path / "a" / "b.json", option="--out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_so_is_a_folder_that_this_user_may_not_look_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def may_not_look(path: Path) -> bool:  # root may
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", may_not_look)
    with pytest.raises(ValueError, match=r"--json is .*, and cannot be written: Permission denied; give another place"):
        output_file(tmp_path / "a.json", option="--json")


def test_so_is_an_open_file_that_is_none_or_only_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (tmp_path / "file").open() as file:
        number = file.fileno()
        for place in (number, number + 500, "no-device"):
            folder = "/dev" if place == "no-device" else "/dev/fd"
            with pytest.raises(ValueError, match=rf"--json is {folder}/{place}, and cannot be written: .*"):
                output_file(Path(f"{folder}/{place}"), option="--json")


def test_an_open_file_is_gone_on_with_where_it_is(tmp_path: Path) -> None:
    with (tmp_path / "printed").open("wb", buffering=0) as file:
        place = Path(f"/dev/fd/{file.fileno()}")
        file.write(b"before ")
        write_json(output_file(place, option="--json"), {"a": 1})
        file.write(b"after")
    assert (tmp_path / "printed").read_bytes() == b'before {"a": 1}\nafter'
    assert is_stdout("/dev/stdout")
    assert not is_stdout(place)


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # Both ends, so that nobody waits for the other.
    end = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    write_json(output_file(pipe, option="--json"), {"a": 1})
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.read(end, 100) == b'{"a": 1}\n'
    os.close(end)
