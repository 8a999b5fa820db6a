"""The end of a run: gloo's threads are idle before the interpreter ends, and the process is as it was before."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.linear import zero3_linear_wrap

from re2tal.distributed import World, free_port
from re2tal.reversible.linear import AddingProducts
from re2tal.training.process_group import leave

# The group outlives `leave`, as those do that an engine refers to. The callback runs on gloo's own thread, and keeps it
# at work in Python while the rank leaves.
LAST_COLLECTIVE = """
import os, time
import torch, torch.distributed as dist
from re2tal.distributed import resolve_world
from re2tal.training.config import EngineConfig
from re2tal.training.process_group import join, leave

def still_at_work(future):
    started.append(True)
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        time.sleep(0.001)
    print("let go", flush=True)

join(resolve_world(os.environ), EngineConfig())
group, started = dist.new_group(), []
# Large enough for the callback to be there before the sum is.
sent = dist.all_reduce(torch.ones(2**22), group=group, async_op=True).get_future().then(still_at_work)
while not started:
    time.sleep(0.001)
leave()
print("left", flush=True)
"""


def test_a_process_ends_well_though_a_thread_of_gloo_was_still_at_work_when_it_left():
    ended = subprocess.run(
        [sys.executable, "-c", LAST_COLLECTIVE],
        env={**os.environ, **World(master_port=free_port()).variables(), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "let go\nleft\n"), ended.stderr


def test_networks_that_are_rewired_after_a_run_under_zero_3_save_as_much_as_before(monkeypatch):
    monkeypatch.setattr(F, "linear", zero3_linear_wrap)
    leave()
    layer, products = torch.nn.Linear(3, 2), []
    with AddingProducts(lambda leaf, rows, columns: products.append(leaf)):
        loss = layer(torch.ones(4, 3)).sum()
    loss.backward()
    assert products == [layer.weight]
