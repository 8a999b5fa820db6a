"""`accelerate launch`: two ranks that train together where it starts two, words where it would start one."""

from __future__ import annotations

import json
import subprocess

import pytest
from distributed.ranks import PATIENCE, free_port
from faults.runs import BIN, TRAIN, alone, small


@pytest.fixture
def accelerate(features, tmp_path):
    """Runs a training of two ranks by `accelerate launch` with more options."""

    def launch(*options: str) -> subprocess.CompletedProcess:
        command = [str(BIN / "accelerate"), "launch", "--num_processes", "2", "--num_machines", "1"]
        command += [
            "--dynamo_backend",
            "no",
            "--main_process_port",
            str(free_port()),
            *options,
            TRAIN[1],
            "--ds",
            "zero2",
        ]
        # With a worker: these ranks are no forks of tests, but start and end as they do for users.
        options = ["--training.epochs", "2", "--schedule.warmup-epochs", "0.5"]
        command += small(features, tmp_path / "run", *options, workers=1)
        return subprocess.run(command, env=alone(), capture_output=True, text=True, check=False, timeout=PATIENCE * 280)

    return launch


def test_where_it_starts_two_ranks_they_train_together(accelerate, tmp_path):
    done = accelerate("--multi_gpu", "--mixed_precision", "no")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ranks"] == 2


@pytest.mark.slow  # tests/test_distributed.py has the words for the variables that are set here
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cpu", "--mixed_precision", "no"], "told it no rank, as it does on a CPU"),
        (["--multi_gpu", "--mixed_precision", "bf16"], "'ACCELERATE_MIXED_PRECISION': 'bf16'}, which would be ignored"),
    ],
)
def test_what_would_be_ignored_is_refused_in_words(accelerate, tmp_path, options, words):
    done = accelerate(*options)
    assert done.returncode != 0
    assert words in done.stderr
    assert not (tmp_path / "run").exists()
