"""What keeps files of tests apart, one after the other and under `pytest --numprocesses N --dist loadgroup`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from re2tal.distributed import World

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of several ranks run one after the other, all others file by file, so that what a file shares is made once.

    Ranks that compete for the cores with other ranks wait in each collective for one that is not running.
    """
    for item in items:
        file = item.path.relative_to(TESTS)
        starters = (hasattr(getattr(item, "module", None), name) for name in ("run_ranks", "launch_ranks"))
        ranks = file.parts[0] in ("distributed", "faults") or any(starters)
        item.add_marker(pytest.mark.xdist_group("ranks" if ranks else str(file)))


@pytest.fixture(scope="module", autouse=True)
def _no_run_left_behind() -> Iterator[None]:
    """The runs of a file's tests end with it: the next file finds no process group and no rank of this process."""
    before = {name: os.environ[name] for name in World().variables() if name in os.environ}
    yield
    if dist.is_initialized():
        from re2tal.training.process_group import leave  # here: it imports DeepSpeed, which few files need

        leave()
    for name in World().variables():
        os.environ.pop(name, None)
    os.environ.update(before)
