"""Starting on a CPU: without a compiler, and past the lock that a killed build of a DeepSpeed op leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys

from re2tal.distributed import World, free_port

JOIN = """
from re2tal.distributed import resolve_world
from re2tal.training.config import EngineConfig
from re2tal.training.process_group import join, leave
import os, torch.distributed as dist
join(resolve_world(os.environ), EngineConfig())
print("joined", dist.get_world_size())
leave()
"""


def test_a_cpu_start_needs_no_compiler_and_does_not_wait_for_a_stale_build_lock(tmp_path):
    for place in ("deepspeed_shm_comm", "cpu_adam"):
        (tmp_path / "extensions" / place).mkdir(parents=True)
        (tmp_path / "extensions" / place / "lock").touch()
    (tmp_path / "bin").mkdir()
    started = subprocess.run(
        [sys.executable, "-c", JOIN],
        env={
            **os.environ,
            **World(master_port=free_port()).variables(),
            "PATH": str(tmp_path / "bin"),
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (started.returncode, started.stdout.split()) == (0, ["joined", "1"]), started.stderr
