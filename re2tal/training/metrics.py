"""The log of a run, on rank 0: a bar on a terminal or plain lines elsewhere, metrics.jsonl, and trackers.

{"step": 40, "kind": "train", "loss": 0.82, "loss/classification": 0.51, "lr": 1e-4, "lr/backbone": 1e-5, ...}
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from re2tal.distributed import mean_over_ranks
from re2tal.machine import peak_resident_bytes
from re2tal.progress import Progress
from re2tal.training.trackers import Figures, Trackers

ON_THE_BAR = {
    "epoch": "epoch {:.1f}",
    "loss": "loss {:.4g}",
    "clips_per_second": "{:.3g} clips/s",
    "loader_wait": "wait {:.0%}",
    "peak_memory_gib": "{:.1f} GiB",
    "skipped": "{:.0f} skipped",
}
"""Figures of training that the bar shows, as they were logged last: to ask the device at each step would cost time."""


class MetricsLog:
    """Appends to the logs of one run folder. A resumed run first forgets what came after the step it resumes from."""

    def __init__(self, folder: Path, *, enabled: bool, trackers: Trackers | None = None) -> None:
        """`enabled`: whether this rank writes."""
        self.folder = folder
        self.enabled = enabled
        self.trackers = trackers
        self.progress: Progress | None = None
        self._about = ""
        self._rows: list[str] = []
        """Not written yet: of a disk that is full or away for a while."""

    def open(self, *, step: int, num_steps: int) -> None:
        """Starts, or continues at optimizer step `step` of `num_steps`."""
        if not self.enabled:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._forget_after(step)
        if self.trackers is not None:
            self.trackers.open(step=step, say=self.say)
        self.progress = Progress(num_steps, start=step, lines=False)

    def advance(self) -> None:
        """One optimizer step is done."""
        if self.progress is not None:
            done = int(self.progress.done) + 1
            self.progress.to(done, f"step {done}/{self.progress.total:.0f}  {self._about}")

    def write(self, kind: str, values: Mapping[str, float], *, step: int) -> None:
        """Logs `values` of one kind ("train", "evaluation") at an optimizer step."""
        if not self.enabled:
            return
        assert self.progress is not None
        self._rows.append(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._write_rows()
        if self.trackers is not None:
            self.trackers.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)
        if kind == "train" and self.progress.has_bar:
            self._about = "  ".join(text.format(values[name]) for name, text in ON_THE_BAR.items() if name in values)
            return
        line = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if "/" not in name or kind != "train")
        self.say(f"step {step}/{self.progress.total:.0f}, {self.progress.left()}  {line}")

    def draw(self, figures: Callable[[], Figures]) -> None:
        """Shows pictures of the step that was done last; they are drawn only where there is something to show them."""
        if self.enabled and self.trackers is not None and self.progress is not None:
            self.trackers.draw(figures, step=int(self.progress.done))

    def _write_rows(self) -> None:
        path, rows = self.folder / "metrics.jsonl", "".join(self._rows).encode()
        try:
            # Unbuffered, so that a full disk shows here and not when the file is closed.
            with path.open("ab", buffering=0) as file:
                whole = file.tell()
                if file.write(rows) < len(rows):  # half a line would spoil the next one
                    os.truncate(path, whole)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            # Checkpoints decide whether a run may go on without its disk.
            self.say(f"{path} cannot be written ({error}); training goes on, {len(self._rows)} lines wait until it can")
        else:
            self._rows.clear()

    def has(self, kind: str, *, step: int) -> bool:
        """Whether values of a kind are logged for a step. On the rank that writes, of an open log."""
        path = self.folder / "metrics.jsonl"
        rows = map(json.loads, path.read_text("utf-8").splitlines()) if path.exists() else ()
        return any(row.get("kind") == kind and row["step"] == step for row in rows)

    def say(self, line: str) -> None:
        """A line for the reader, above the bar if there is one."""
        if not self.enabled:
            return
        if self.progress is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self.progress.say(line, file=sys.stderr)

    def close(self) -> None:
        """Takes the bar away, and ends the trackers."""
        if self.progress is not None:
            self.progress.close()
            self.progress = None
        if self.trackers is not None and self.enabled:
            self.trackers.close()

    def _forget_after(self, step: int) -> None:
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        kept, damaged = [], []
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                row = json.loads(line)
                if int(row["step"]) <= step and line.endswith(b"\n"):
                    kept.append(line)
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                damaged.append(line)
        if damaged:
            # A run that was killed leaves half a line at the end. Others are a disk's doing, and someone may want them.
            aside = path.with_suffix(".damaged")
            with aside.open("ab") as file:
                file.writelines(line.rstrip(b"\n") + b"\n" for line in damaged)
            self.say(f"{path} had {len(damaged)} lines that cannot be read; they are in {aside.name} now")
        # Replaced, not cut in place: a crash half-way leaves the old file.
        replacement = path.with_suffix(".tmp")
        replacement.write_bytes(b"".join(kept))
        os.replace(replacement, path)


class Meter:
    """Losses and speed since the last report."""

    def __init__(self, *, clips_per_step: int) -> None:
        self.clips_per_step = clips_per_step
        self._losses: list[dict[str, Tensor]] = []
        self._seconds = self._waited = 0.0

    def add(self, losses: dict[str, Tensor], *, seconds: float, waited: float) -> None:
        """One optimizer step of all ranks; `waited`: how many of its `seconds` this rank waited for the loader."""
        self._losses.append(losses)
        self._seconds += seconds
        self._waited += waited

    def take(self, *, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
        """Every rank calls this: mean losses over steps and ranks, and figures of speed; starts over.

        `clips_per_second` is of all ranks, `loader_wait` the share of its time that a rank waited for the loader.
        """
        names = list(self._losses[0])
        means = [torch.stack([losses[name] for losses in self._losses]).mean() for name in names]
        # All figures of the line travel in one collective.
        own = torch.stack([*means, means[0].new_tensor(self._waited / self._seconds)])
        *losses, loader_wait = mean_over_ranks(own.to(device)).tolist()
        clips_per_second = self.clips_per_step * len(self._losses) / self._seconds
        self._losses, self._seconds, self._waited = [], 0.0, 0.0
        speed = {"clips_per_second": clips_per_second, "loader_wait": loader_wait}
        return dict(zip(names, losses, strict=True)), speed


def peak_memory_gib(device: torch.device) -> float:
    """The most memory used so far, in GiB: allocated on the device, or resident in this process on a CPU."""
    if device.type == "cpu":
        return peak_resident_bytes() / 2**30
    return torch.get_device_module(device).max_memory_allocated(device) / 2**30
