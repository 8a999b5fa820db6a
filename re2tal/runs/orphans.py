"""Ranks end with what launched them. A launcher that is killed, or told to stop, leaves its ranks training otherwise.

    deepspeed (runner) -> deepspeed.launcher.launch -> rank         a runner that ends says nothing to the two below it
    torchrun, srun                                  -> rank         they pass SIGTERM on, but may be killed

A rank whose launcher is gone is told to stop: it saves and ends. One that cannot ends after a while.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

from re2tal.training.signals import PARENT_IS_GONE, ask_to_stop
from re2tal.training.watchdog import timer_is_taken

PR_SET_PDEATHSIG = 1
GRACE_SECONDS = 120.0
"""For the step, a checkpoint and the end of a rank whose launcher is gone."""
SHELLS = ("bash", "sh", "dash", "zsh", "fish", "ksh", "tcsh", "screen", "tmux")
"""Closing these is no reason to end what they started."""


def end_with_the_launcher() -> None:
    """To be called inside `stop_requests`; does nothing in a process that a shell, or nobody, launched."""
    # Init (1) is the parent of what was started by nobody, or whose parent has gone already.
    parent = os.getppid()
    name = _command(parent).split(" ")[0].rpartition("/")[2].lstrip("-")
    if not ({"RANK", "SLURM_PROCID"} & os.environ.keys()) or parent <= 1 or name.startswith(SHELLS):
        return
    # DeepSpeed's runner and the process it starts ranks through are two, and signals end the first alone.
    watched = {os.getpid(): parent}
    if "deepspeed.launcher.launch" in _command(parent) and (runner := _parent(parent)) is not None and runner > 1:
        watched[parent] = runner
    # The system itself tells this process, at once; what is not a child of ours is looked at every half second.
    told = sys.platform == "linux" and ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, PARENT_IS_GONE) == 0
    threading.Thread(target=_watch, args=(watched, os.getpid() if told else None), daemon=True).start()


def _watch(watched: dict[int, int], told_of: int | None) -> None:
    """Ends this process when a process of `watched` loses the parent it had.

    `told_of`: the process for which the system itself sends the signal.
    """
    while not (lost := [child for child, parent in watched.items() if _parent(child) != parent]):
        time.sleep(0.5)
    # Not in Python, which a rank that hangs in native code cannot run.
    timer_is_taken.set()
    faulthandler.dump_traceback_later(GRACE_SECONDS, exit=True)
    print(
        f"rank {os.environ.get('RANK', '?')}: its launcher (process {watched[lost[0]]}) is gone; it saves and ends, "
        f"within {GRACE_SECONDS:g} s",
        file=sys.stderr,
        flush=True,
    )
    # The signal came, or comes, by itself.
    if told_of not in lost:
        ask_to_stop()


def _parent(pid: int) -> int | None:
    """None where there is no such process, or the system does not tell."""
    if pid == os.getpid():
        return os.getppid()
    try:
        return int(Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace").rpartition(")")[2].split()[1])
    except OSError:
        return None


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text("utf-8", errors="replace").replace("\0", " ")
    except OSError:
        return ""
