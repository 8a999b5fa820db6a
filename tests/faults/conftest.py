"""What the runs of these tests learn from."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.runs import write_both_subsets


@pytest.fixture(scope="session")
def features(tmp_path_factory) -> Path:
    """Eight videos for training, eight for validation."""
    return write_both_subsets(tmp_path_factory.mktemp("features"))
