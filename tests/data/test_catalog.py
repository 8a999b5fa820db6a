"""The contract of a row of DATASETS. A new row is picked up here; no test needs to be edited for it."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

import re2tal
from re2tal.data.building.catalog import DATASETS, DatasetSpec, find_dataset

CONSUMERS = [path.read_text() for path in (Path(re2tal.__file__).parent / "runs").glob("*.py")]


def fields_read(source: str) -> set[str]:
    """Attributes that a module reads of what `find_dataset` gives, or of an argument that is a DatasetSpec."""
    tree = ast.parse(source)
    names = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        if isinstance(node.value.func, ast.Name) and node.value.func.id == "find_dataset"
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation and "DatasetSpec" in ast.unparse(node.annotation):
            names.add(node.arg)
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names
    }


def unread(sources: list[str]) -> set[str]:
    return {field.name for field in fields(DatasetSpec)} - set().union(*map(fields_read, sources))


def test_every_field_of_a_row_is_read():
    assert unread(CONSUMERS) == set()


@pytest.mark.parametrize("field", [field.name for field in fields(DatasetSpec)])
def test_a_field_that_nobody_reads_is_caught(field):
    assert unread([source.replace(f"spec.{field}", "spec") for source in CONSUMERS]) == {field}


@pytest.mark.parametrize("name", DATASETS)
def test_a_row_is_complete(name):
    row = find_dataset(name)
    assert all("{id}" in file_name for file_name in row.file_names)
    assert row.classes is None or list(row.classes) == sorted(set(row.classes))


def test_an_unknown_name_shows_those_there_are():
    with pytest.raises(ValueError, match=re.escape(f"unknown data set 'thumos'; known: {sorted(DATASETS)}")):
        find_dataset("thumos")
