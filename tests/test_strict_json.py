"""Strict JSON: limits that tests of its users do not reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from re2tal.strict_json import finite_number, read_json, write_json


def test_a_document_survives(tmp_path: Path) -> None:
    document = {"a": [1, 2.5, "ü", None, True], "b": {}}
    write_json(tmp_path / "d.json", document)
    assert read_json(tmp_path / "d.json") == document
    assert [path.name for path in tmp_path.iterdir()] == ["d.json"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_encodings_are_recognised(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "d.json").write_text('{"ü": 1}', encoding=encoding)
    assert read_json(tmp_path / "d.json") == {"ü": 1}


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text("[1, 2, 3]")
    with pytest.raises(ValueError, match=r"d\.json has 9 bytes, more than the limit of 8"):
        read_json(tmp_path / "d.json", max_bytes=8)


def test_the_repeated_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text('{"x": {"b": 1, "a": 2, "a": 3}}')
    with pytest.raises(ValueError, match="the key 'a' appears twice in one object; keep one"):
        read_json(tmp_path / "d.json")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_json(tmp_path)


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "d.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_numbers_in_texts_are_those_that_people_write() -> None:
    assert [finite_number(text) for text in ("12", " -1.5 ", "1e3", ".5", "5.", "+2")] == [12, -1.5, 1000, 0.5, 5, 2]
    odd = ("1_000", "\N{ARABIC-INDIC DIGIT ONE}", "nan", "inf", "1,5", "1,000", "0x10", "1e999", "", "5 s", True, None)
    assert [finite_number(value) for value in odd] == [None] * len(odd)
