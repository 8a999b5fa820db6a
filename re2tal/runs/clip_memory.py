"""Training on a share of the clips: the backbone's memory in the run folder, told of every batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor, nn

from re2tal.backbones.clip_memory import ClipMemory
from re2tal.distributed import World, gather_objects
from re2tal.runs.folder import CLIP_FEATURES_NAME
from re2tal.structures import Batch
from re2tal.training.trainer import Prepare


def remembering_clips(
    prepare: Prepare, backbone: nn.Module, folder: Path, share: float, *, seed: int, world: World
) -> Prepare:
    """Gives the backbone a memory, in which `prepare` then announces every batch that it prepares."""
    memory = ClipMemory(folder / CLIP_FEATURES_NAME, share=share, most=lambda number: max(gather_objects(number)))
    backbone.memory = memory  # type: ignore[assignment]

    def prepared(batch: Batch, position: int) -> Tensor:
        # Videos that could not be decoded have grey frames.
        known = zip(batch.video_ids, batch.valid.tolist(), strict=True)
        # 1 keeps this apart from what else draws by place: colours, and the network's own draws (2).
        drawn = np.random.SeedSequence([seed, 1, position * world.world_size + world.rank]).generate_state(1)
        memory.next_batch([video if valid else None for video, valid in known], seed=int(drawn[0]))
        return prepare(batch, position)

    return prepared


def forget_clips(folder: Path) -> None:
    """Every rank calls this before the first step of a new run: an earlier one left features of other weights."""
    for path in (folder / CLIP_FEATURES_NAME).glob("*"):
        path.unlink(missing_ok=True)


def approximation(share: float) -> str:
    """What a share of the clips means, for the log and the summary."""
    return (
        f"approximation: a step trains {share:g} of the clips of a video; the others take features that earlier "
        "weights gave (backbone.trained_clips)"
    )
