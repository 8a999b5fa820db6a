import pytest

from re2tal.data.building.catalog import DATASETS, find_dataset
from re2tal.evaluation.protocols import TIOU_THRESHOLDS


@pytest.mark.parametrize("name", DATASETS)
def test_a_row_is_complete(name):
    row = find_dataset(name)
    assert all("{id}" in file_name for file_name in row.file_names)
    assert row.classes is None or list(row.classes) == sorted(set(row.classes))


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"own"}))
def test_a_data_set_has_thresholds_under_the_same_name(name):
    assert name in TIOU_THRESHOLDS


def test_an_unknown_name_shows_those_there_are():
    with pytest.raises(ValueError, match=r"unknown data set 'thumos'; known: \['activitynet', 'demo', 'own'"):
        find_dataset("thumos")
