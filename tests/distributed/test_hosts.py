"""Two hosts in network namespaces; `python tests/distributed/hosts.py` has three, and all launchers."""

from __future__ import annotations

import pytest
from distributed.hosts import features, lose_one, train_on, why_not

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _namespaces():
    if reason := why_not():
        pytest.skip(reason)


def test_two_hosts_train_what_one_process_trains(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    row = train_on(2, 1, "deepspeed", data=features(tmp_path / "features"), folder=folder)
    assert row["held"], row


@pytest.mark.parametrize("fault", ["cut link", "vanished host"])
def test_a_lost_host_is_named_within_the_limit(fault, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    row = lose_one(2, 1, fault, data=features(tmp_path / "features"), folder=folder)
    assert row["held"], row
