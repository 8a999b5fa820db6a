"""What a checkpoint says of its run, by name, and whether a run that resumes it is the same one."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from re2tal.distributed import is_main
from re2tal.training.elastic import ACCUMULATION, RANKS, batches_of_step

SHAPE = (RANKS, ACCUMULATION, "ZeRO stage")
"""What may change as long as a step takes as many clips. See `elastic` and `reshard`."""
VALIDATION = "validation shards"
"""What may change, but not without a word. Checkpoints of earlier versions do not say it."""


def refuse_another_run(
    checkpoint: Path, saved: Mapping[str, Any], ours: Mapping[str, Any], *, free: Collection[str]
) -> None:
    """ValueError that names what differs between the run of a checkpoint and ours, but for the shape and `free`."""
    changes = [
        f"{name} is {ours.get(name)!r}, the checkpoint has {saved.get(name)!r}"
        for name in sorted(ours.keys() | saved.keys())
        if name not in (*SHAPE, VALIDATION, *free) and not _alike(ours.get(name), saved.get(name))
    ]
    # Ranks and accumulation may change, but not their product: the learning rate was chosen for it.
    batches, before = batches_of_step(ours), batches_of_step(saved)
    if batches != before:
        changes.append(f"a step takes {batches} batches of all ranks together, the checkpoint's {before}")
    if changes:
        raise ValueError(
            f"{checkpoint} is of another run: {'; '.join(changes)}. Resume with the config.json of its run folder or "
            "choose another folder"
        )
    if saved.get(VALIDATION, ours.get(VALIDATION)) != ours.get(VALIDATION) and is_main():
        print(
            f"{VALIDATION} have changed since {checkpoint}: figures of before and after are of other videos or labels",
            file=sys.stderr,
        )


def changed_values(
    saved: Mapping[str, Any], ours: Mapping[str, Any], *, free: Collection[str]
) -> dict[str, tuple[Any, Any]]:
    """Those of `free` that are not as in the checkpoint: name -> what it has, what the run has now."""
    return {
        name: (saved[name], ours.get(name))
        for name in sorted(set(free) & saved.keys())
        if not _alike(ours.get(name), saved[name])
    }


def _alike(ours: Any, saved: Any) -> bool:
    # Checkpoints from before paths were written absolute have them as they were given.
    paths = isinstance(ours, str) and isinstance(saved, str) and Path(ours).is_absolute()
    return ours == saved or (paths and Path(ours) == Path(saved).absolute())
