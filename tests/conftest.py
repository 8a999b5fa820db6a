"""Which tests may run side by side under `pytest --numprocesses N --dist loadgroup`."""

from __future__ import annotations

from pathlib import Path

import pytest

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
