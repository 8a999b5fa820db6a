"""Checkpoints that a crash at any moment cannot spoil.

    tmp-step-00000042/  files of all ranks, flushed -> manifest.json, sizes and SHA-256, sealed, flushed
                        -> renamed to step-00000042/ -> `latest` replaced -> old ones removed

A folder called step-* is therefore complete, unless its disk lied: then its manifest does not verify and the one before
it is loaded. Everything is read with `weights_only=True`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from re2tal.distributed import gather_objects, is_main, named_host
from re2tal.files import sha256_of, write_atomically
from re2tal.training.agreement import refuse_drifted_replicas
from re2tal.training.checkpoint_files import PAUSES_SECONDS, with_retries
from re2tal.training.deepspeed_import import Engine
from re2tal.training.elastic import place_in_run
from re2tal.training.ema import WeightAverage
from re2tal.training.finite import all_finite, find_non_finite
from re2tal.training.identity import SHAPE, changed_values, refuse_another_run
from re2tal.training.manifest import (
    TrainingProgress,
    complete_checkpoints,
    newest_sound,
    read_manifest,
    write_manifest,
)
from re2tal.training.reshard import resharded
from re2tal.training.saved_state import refuse_scrambled
from re2tal.training.stall import Stall
from re2tal.training.watchdog import at

RANK_FILE = "rank-{:05d}.pt"


class CheckpointStore:
    """The checkpoints of one run in one folder, which all ranks must be able to write."""

    def __init__(
        self,
        folder: Path,
        *,
        identity: Mapping[str, Any],
        free: Collection[str] = (),
        defaults: Mapping[str, Any] | None = None,
        keep: int = 2,
    ) -> None:
        """`identity`: JSON values by name that must be the same when the run is resumed, but for those named in `free`;
        `keep`: how many to keep.

        `defaults`: what the values were before they had a name; checkpoints of earlier versions lack them.
        """
        self.folder = folder
        self.identity = json.loads(json.dumps(dict(identity)))  # as manifests give it back: tuples are lists
        self.free = frozenset(free)
        self.changed: dict[str, tuple[Any, Any]] = {}
        self.defaults = json.loads(json.dumps(dict(defaults or {}), default=str))
        self.keep = keep
        self.pauses_seconds: Sequence[float] = PAUSES_SECONDS
        self._stall = Stall()
        self._wrote = False

    def save(self, engine: Engine, average: WeightAverage | None, progress: TrainingProgress) -> Path:
        """Every rank calls this between two optimizer steps.

        Raises OSError on all ranks, old checkpoints kept, if one fails again and again, and FloatingPointError if there
        is anything in the weights that no run should go on from.
        """
        started = time.monotonic()
        at(f"the checkpoint of step {progress.step}", patient=True)
        # First: nobody could tell a checkpoint of such weights from a sound one, and it would push out older ones.
        refuse_drifted_replicas(engine, step=progress.step)
        if poison := _non_finite_by_rank(engine, average):
            raise FloatingPointError(
                f"after step {progress.step} not all numbers are finite: {poison}; no checkpoint is written, earlier "
                "ones are intact. Lower the learning rate or lengthen the warmup, then resume"
            )
        # It raises on all ranks or on none: all try again.
        written = with_retries(lambda: self._write(engine, average, progress), pauses_seconds=self.pauses_seconds)
        advice = self._stall.add(progress.step, started=started, ended=time.monotonic())
        if advice and is_main():
            print(advice, file=sys.stderr, flush=True)
        return written

    def load_newest(self, engine: Engine, average: WeightAverage | None) -> TrainingProgress | None:
        """Every rank calls this: restores the newest checkpoint that verifies; None where there is none at all.

        Raises ValueError when all are damaged, naming the files, or when it is of another run, naming what changed.
        """
        unfit: dict[str, str] = {}
        while True:
            # Rank 0 decides for all: a shared disk may show a folder to one rank before the others.
            [(name, manifest, faults), *_] = gather_objects(
                newest_sound(self.folder, unfit=unfit) if is_main() else (None, None, {})
            )
            if name is None and faults:
                raise ValueError(
                    f"no checkpoint in {self.folder} is sound: {faults}; remove the folder to start afresh"
                )
            if name is None or manifest is None:
                return None
            saved = {key: self.defaults[key] for key in self.identity.keys() & self.defaults.keys()} | manifest.run
            refuse_another_run(self.folder / name, saved, self.identity, free=self.free)
            self.changed = changed_values(manifest.run, self.identity, free=self.free)
            self._restore(name, manifest.run, engine, average)
            # Versions before this one saved whatever there was.
            if not (poison := _non_finite_by_rank(engine, average)):
                return place_in_run(manifest.progress, manifest.run, num_ranks=_rank()[1])
            unfit[name] = f"not all numbers are finite: {poison}"

    def newest_run(self) -> dict[str, Any] | None:
        """The identity of the run in the newest checkpoint whose manifest can be read; its files are not looked at."""
        for name in complete_checkpoints(self.folder):
            with suppress(ValueError):
                return read_manifest(self.folder / name, files=False).run
        return None

    # ---------------------------------------------------------------------------------------------------------- writing

    def _write(self, engine: Engine, average: WeightAverage | None, progress: TrainingProgress) -> Path:
        """Every rank calls this. OSError on all of them, and nothing left of it, where one fails."""
        name = f"step-{progress.step:08d}"
        partial = self.folder / f"tmp-{name}"
        failures: list[OSError] = []
        if is_main():
            try:
                if self._wrote and not complete_checkpoints(self.folder):
                    gone = "are gone: somebody removed them, or their disk is no longer mounted there"
                    print(f"the earlier checkpoints in {self.folder} {gone}; saving goes on", file=sys.stderr)
                self.folder.mkdir(parents=True, exist_ok=True)
                self._remove_leftovers()
                partial.mkdir()
            except OSError as error:
                failures.append(error)
        # Also a barrier: no rank writes before the folder is there.
        self._raise_together(failures, partial)
        # `latest` is ours: it changes when the folder is complete, not before.
        engine.save_checkpoint(str(self.folder), tag=partial.name, save_latest=False)
        engine.checkpoint_engine.save(_rank_state(engine, average), str(partial / RANK_FILE.format(_rank()[0])))
        # Collected until here, because DeepSpeed has barriers inside its own saving.
        self._raise_together(engine.checkpoint_engine.take_failures(), partial)
        sums = self._digests(partial)
        if is_main():
            try:
                write_manifest(partial, run=self.identity, progress=progress, files=sums)
                self._commit(partial, self.folder / name)
            except OSError as error:
                failures.append(error)
        self._raise_together(failures, partial)
        self._wrote = True
        return self.folder / name

    def _digests(self, partial: Path) -> dict[str, dict[str, Any]]:
        """Every rank calls this: name -> size and SHA-256 of every file, the work shared between the ranks.

        Of the files as they lie there: DeepSpeed wrote most of them, and nobody else knows their bytes.
        """
        rank, ranks = _rank()
        mine: dict[str, dict[str, Any]] = {}
        failures: list[OSError] = []
        try:
            # All ranks list the same files: they have just agreed that everything is written.
            for path in sorted(path for path in partial.iterdir() if path.is_file())[rank::ranks]:
                mine[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        except OSError as error:
            failures.append(error)
        self._raise_together(failures, partial)
        return {name: digest for part in gather_objects(mine) for name, digest in sorted(part.items())}

    def _commit(self, partial: Path, final: Path) -> None:
        _flush_folder(partial)  # names are on the disk only when their folder is
        if final.exists():
            # A damaged checkpoint of this very step, passed over when the run resumed.
            os.replace(final, self.folder / f"tmp-replaced-{final.name}")
        os.replace(partial, final)
        _flush_folder(self.folder)
        # For DeepSpeed's own tools. This program goes by the names of the folders.
        write_atomically(self.folder / "latest", final.name + "\n")
        _flush_folder(self.folder)
        names = complete_checkpoints(self.folder)
        # Newer ones are damaged, and were passed over: beside them this one has to stay, and those that it follows.
        for old in names[names.index(final.name) + self.keep :]:  # last: a crash until here falls back to these
            _remove(self.folder / old)
        self._remove_leftovers()

    def _raise_together(self, failures: list[OSError], partial: Path) -> None:
        """Every rank calls this: an error on one rank is an error on all, so that none waits for the others."""
        reports = [report for reports in gather_objects([str(failure) for failure in failures]) for report in reports]
        if reports:
            if is_main():
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"checkpoint {partial.name.removeprefix('tmp-')} was not written to {self.folder}: {'; '.join(reports)}"
            )

    def _remove_leftovers(self) -> None:
        for leftover in self.folder.glob("tmp-*"):
            _remove(leftover)

    # ---------------------------------------------------------------------------------------------------------- reading

    def _restore(self, name: str, saved: Mapping[str, Any], engine: Engine, average: WeightAverage | None) -> None:
        """Every rank calls this: takes over a checkpoint of this run, of its shape or another."""
        load = engine.checkpoint_engine.load
        # DeepSpeed loads only what as many ranks wrote under the same stage.
        if any(self.identity.get(key) != saved.get(key) for key in SHAPE):
            resharded(self.folder / name, engine, average, read=lambda path: load(str(path), map_location="cpu"))
            return
        try:
            loaded, rest = engine.load_checkpoint(str(self.folder), tag=name)
        except RuntimeError as error:
            # What DeepSpeed says of it is enough to go by.
            if "parameter_alignment" not in str(error):
                raise
            raise ValueError(f"{self.folder / name}: {error}") from None
        assert loaded is not None
        refuse_scrambled(self.folder / name, rest.get("ds_config"), num_ranks=_rank()[1])
        _restore_rank_state(
            engine, average, load(str(self.folder / name / RANK_FILE.format(_rank()[0])), map_location="cpu")
        )


def _non_finite_by_rank(engine: Engine, average: WeightAverage | None) -> str:
    """Every rank calls this: on which ranks something is not finite, in words; empty if all is well."""
    fault = find_non_finite(engine)
    if fault is None and average is not None and not all_finite(average.shards):
        fault = "the average of the weights"
    answers = gather_objects((named_host(), fault))
    return ", ".join(f"{what} on rank {rank} (host {host})" for rank, (host, what) in enumerate(answers) if what)


def _rank_state(engine: Engine, average: WeightAverage | None) -> dict[str, Any]:
    """State of this rank that DeepSpeed does not save: buffers, its shards of the average."""
    return {
        "buffers": {name: buffer.cpu() for name, buffer in engine.module.named_buffers()},
        "average": None if average is None else average.state(),
    }


@torch.no_grad()
def _restore_rank_state(engine: Engine, average: WeightAverage | None, state: dict[str, Any]) -> None:
    buffers = dict(engine.module.named_buffers())
    for name, saved in state["buffers"].items():
        buffers[name].copy_(saved)
    if average is not None:
        average.restore(state["average"])


def _rank() -> tuple[int, int]:
    """Its number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _remove(path: Path) -> None:
    """What cannot be removed stays, and is told of: a file that another process reads is still there on NFS, and no run
    ends for that."""
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        print(f"{path} cannot be removed ({error}); saving goes on", file=sys.stderr, flush=True)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
