"""An annotation file as readers ask for it: as text, JSON, XML or a table."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from re2tal.strict_json import read_json

MAX_BYTES = 1 << 28
"""An export of this size holds millions of rows."""
_SEPARATOR = re.compile(r'"?sep=([^\w\s"]|\t)"?', re.ASCII | re.IGNORECASE)
"""A first line by which Excel is told what stands between cells."""


class Source:
    """An annotation file, parsed as it is asked for. ValueError says why it cannot be."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; check the path")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{path} has {size} bytes, more than the limit of {MAX_BYTES}; split it")
        self.path = path
        with path.open("rb") as file:
            head = file.read(4096).lstrip(codecs.BOM_UTF8).replace(b"\0", b"").lstrip(b"\xff\xfe \t\r\n")
        self.kind = {b"<": "xml", b"{": "json", b"[": "json"}.get(head[:1], "text")

    @cached_property
    def text(self) -> str:
        """The file as text; UTF-16 where a byte order mark says so."""
        content = self.path.read_bytes()
        marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        try:
            return content.decode("utf-16" if content.startswith(marks) else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not text in UTF-8 ({error}); save it as UTF-8") from None

    @cached_property
    def lines(self) -> list[str]:
        """The text's lines. str.splitlines would also cut at the separators and form feeds that cells may hold."""
        return re.split("\r\n|\r|\n", self.text)

    @cached_property
    def json(self) -> Any:
        """The file as JSON; None for another kind."""
        return read_json(self.path, max_bytes=MAX_BYTES) if self.kind == "json" else None

    @cached_property
    def xml(self) -> ElementTree.Element | None:
        """The root of an XML file; None for another kind. A document type is refused: entities come with it."""
        if self.kind != "xml":
            return None
        content = self.path.read_bytes()
        parser = ElementTree.XMLParser(target=_WithoutDoctype())
        try:
            if b"<!DOCTYPE" in content.replace(b"\0", b""):  # expat would expand entities up to the end of a chunk
                _WithoutDoctype().doctype("", None, None)
            parser.feed(content)
            root = parser.close()
        except (ElementTree.ParseError, LookupError) as error:
            raise ValueError(f"{self.path} is not usable XML: {error}") from None
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        assert isinstance(root, ElementTree.Element)
        return root

    @cached_property
    def delimiter(self) -> str:
        """What stands between the cells of a table, by its first rows."""
        lines = self.lines[:100]
        if said := _SEPARATOR.fullmatch(lines[0]):
            return said[1]
        return max("\t;,", key=lambda one: sum(line.count(one) >= 2 for line in lines))

    @cached_property
    def rows(self) -> list[list[str]]:
        """The cells of a table; empty for another kind."""
        if self.kind != "text":
            return []
        text, delimiter = io.StringIO(self.text, newline=""), self.delimiter
        try:
            rows = [[cell.strip() for cell in row] for row in csv.reader(text, delimiter=delimiter)]
        except csv.Error as error:
            raise ValueError(f"{self.path} is not usable as a table: {error}") from None
        if _SEPARATOR.fullmatch(self.lines[0]):
            rows[0] = []  # it stays a row, so that those below keep their numbers
        columns = max(3, len(next(filter(None, rows), ())))
        for number, row in enumerate(rows, start=1):
            lines = [line for cell in row if "\n" in cell for line in cell.split("\n")[1:]]
            # A quote that is not closed swallows the rows below: they would be gone without a word.
            if any(line.count(delimiter) >= columns - 1 for line in lines):
                raise ValueError(f"{self.path} row {number} holds whole rows: a quote opens and does not close")
        return rows

    def table(self, *wanted: str) -> tuple[int, list[str]] | None:
        """(index of its row, cells in small letters) of the first header with all these columns; None without one."""
        for number, row in enumerate(self.rows[:100]):
            header = [cell.lower() for cell in row]
            if set(wanted) <= set(header):
                return number, header
        return None

    def records(
        self, number: int, header: Sequence[str], leave_out: Callable[[str, str], None]
    ) -> Iterator[tuple[str, dict[str, str]]]:
        """(where, cells by column) of every row that is not empty, below the header in row `number`.

        A row that has more cells than the header is left out.
        """
        for line, row in enumerate(self.rows[number + 1 :], start=number + 2):
            where = f"{self.path.name} row {line}"
            if any(row[len(header) :]):
                leave_out(where, f"it has {len(row)} cells, more than the header's {len(header)}: quote commas")
            elif any(row):
                padded = [*row, *[""] * (len(header) - len(row))]
                yield where, dict(zip(header, padded, strict=False))


class _WithoutDoctype(ElementTree.TreeBuilder):
    def doctype(self, name: str, public_id: str | None, system_id: str | None) -> None:
        raise ValueError("it has a document type (<!DOCTYPE>), which could name entities and other files; remove it")
