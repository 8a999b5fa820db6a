"""TALLFormer's way to train on long videos (Cheng and Bertasius, ECCV 2022): a step trains a share of the clips, and
takes the features of the others from a memory of what the backbone last gave for them.

    clips of a video ->  a random share    encoded with a graph -----> features, and into the memory
                         the others        read from the memory -----> features without a gradient
                                           not there yet: encoded without a graph, and into the memory

It is an approximation. Features of the memory come from earlier weights, crops and colours, and pass no gradient on.
Evaluation encodes all clips.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from math import ceil
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Encoded = Callable[[Sequence[int]], Tensor]
"""Numbers of clips -> their features, (B, clips, steps, C)."""


class ClipMemory:
    """The last features of every clip of every video, a file per video: (clips, steps, C) float16, NaN where unknown.

    Ranks may share the folder. A file that is damaged, or of another shape, counts as unknown. Where the disk is full,
    files stay as they are.
    """

    def __init__(self, folder: Path, *, share: float, most: Callable[[int], int] = int) -> None:
        """`share`: of the clips that a step trains; `most`: number -> the largest of all ranks, which call it together.

        The folder is made, if need be.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.share = folder, share
        self._most = most
        self._told = False
        self._next: tuple[tuple[str | None, ...], int] | None = None

    def next_batch(self, video_ids: Sequence[str | None], *, seed: int) -> None:
        """Says which videos come next, with None for those not to be remembered, and what draws the clips to train."""
        self._next = tuple(video_ids), seed

    def features(self, encoded: Encoded, *, num_clips: int, steps: int, channels: int) -> Tensor:
        """Features of all clips of the next batch, (B, clips, steps, C). Every rank calls this equally often.

        Raises RuntimeError where nobody said which videos these are.
        """
        if self._next is None:
            raise RuntimeError("a memory of clips was not told which videos come next: call next_batch before forward")
        (video_ids, seed), self._next = self._next, None
        order = np.random.default_rng(seed).permutation(num_clips).tolist()
        number = self.num_trained(num_clips)
        trained, others = sorted(order[:number]), order[number:]
        stored = [self._read(video_id, (num_clips, steps, channels)) for video_id in video_ids]
        unknown = sorted(clip for clip in others if any(np.isnan(video[clip]).any() for video in stored))
        whole = torch.from_numpy(np.stack(stored))
        with torch.no_grad():
            for clips, values in self._encode(encoded, unknown, filler=trained):
                whole[:, clips] = values.to(whole)
        features = encoded(trained)
        whole = whole.to(features)
        whole[:, trained] = features.detach()
        for video_id, values in zip(video_ids, whole, strict=True):
            self._write(video_id, values)
        return whole.index_copy(1, torch.tensor(trained, device=features.device), features)

    def num_trained(self, num_clips: int) -> int:
        """How many clips of a video a step trains."""
        return max(1, round(self.share * num_clips))

    def _encode(
        self, encoded: Encoded, clips: Sequence[int], *, filler: Sequence[int]
    ) -> list[tuple[list[int], Tensor]]:
        """These clips, as many at a time as are trained, and equally often on all ranks: under ZeRO-3 a forward is a
        collective."""
        number, found = len(filler), []
        for part in range(self._most(ceil(len(clips) / number))):
            wanted = list(clips[part * number : (part + 1) * number])
            values = encoded([*wanted, *filler][:number])
            found.append((wanted, values[:, : len(wanted)]))
        return found

    def _path(self, video_id: str) -> Path:
        return self.folder / f"{sha256(video_id.encode()).hexdigest()[:32]}.npy"

    def _read(self, video_id: str | None, shape: tuple[int, ...]) -> np.ndarray:
        """In float32; NaN where nothing is known."""
        unknown = np.full(shape, np.nan, dtype=np.float32)
        if video_id is None or not self._path(video_id).is_file():
            return unknown
        try:
            found = np.load(self._path(video_id), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):  # a machine that lost its power; what is unknown is encoded anew
            return unknown
        return np.array(found, dtype=np.float32) if found.shape == shape and found.dtype == np.float16 else unknown

    def _write(self, video_id: str | None, values: Tensor) -> None:
        """All of a video's clips; what float16 cannot hold is unknown."""
        if video_id is None:
            return
        narrow = values.to("cpu", torch.float16)
        narrow[~narrow.isfinite()] = torch.nan
        path, partial = self._path(video_id), None
        try:
            with NamedTemporaryFile(dir=self.folder, suffix=".partial", delete=False) as file:
                partial = Path(file.name)
                np.save(file, narrow.numpy(), allow_pickle=False)
            partial.replace(path)
        except OSError as error:  # checkpoints decide whether a run may go on without its disk
            if not self._told:
                logger.warning("%s keeps what it had: %s; training goes on with that", self.folder, error)
            self._told = True
            with suppress(OSError):
                if partial is not None:
                    partial.unlink(missing_ok=True)
