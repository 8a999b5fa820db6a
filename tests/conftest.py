"""What keeps files of tests apart, one after the other and under `pytest --numprocesses N --dist loadscope`."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from re2tal.distributed import World


@pytest.hookimpl(optionalhook=True)  # where pytest-xdist is installed
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of several ranks run one after the other, all others file by file, so that what a file shares is made once.

    Ranks that compete for the cores with other ranks wait in each collective for one that is not running.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Rooms(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ranks" if starts_ranks(config.rootpath / file) else file

    return Rooms(config, log) if config.getvalue("dist") == "loadscope" else None


@cache
def starts_ranks(file: Path) -> bool:
    return file.parent.name in ("distributed", "faults") or "from distributed." in file.read_text()


class _Imported:
    """Keeps collections of garbage, for which much of what is tested asks, from looking through all that was imported.

    Half a million objects with torch alone, and two million at the end, of which none is ever garbage.
    """

    seen = 0

    def pytest_collection_finish(self) -> None:
        self.pytest_runtest_logfinish()

    def pytest_runtest_logfinish(self) -> None:
        if len(sys.modules) > self.seen + 100:  # as after the first use of a large library
            gc.collect()
            gc.freeze()
            self.seen = len(sys.modules)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Imported())


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
