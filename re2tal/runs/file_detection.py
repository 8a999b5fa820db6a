"""Detections in video files, one video after the other: `re2tal detect` and `Detector` are both this."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from re2tal.config import RunConfig
from re2tal.data.addresses.address import Address, Source
from re2tal.data.building.probe import MAX_DAMAGED
from re2tal.data.contract.manifest import Rejection
from re2tal.data.streaming.live import LiveClip, collate_live
from re2tal.detector import TemporalActionDetector
from re2tal.evaluation.selection import Selection
from re2tal.inference import Windows, detect_windows, merge_windows
from re2tal.progress import Progress
from re2tal.reporting.found import FoundInVideo
from re2tal.runs.watching import Closed, Fetching, Opened, Seen, watch
from re2tal.structures import Detections

EVERYTHING = Selection()


@dataclass(frozen=True, slots=True)
class Look:
    """How a detector looks at video files."""

    network: TemporalActionDetector
    config: RunConfig
    device: torch.device
    batch_size: int
    selection: Selection = EVERYTHING
    max_damaged: float = MAX_DAMAGED

    def at(self, clips: list[LiveClip]) -> Windows:
        """What clips show, before suppression, without what cannot matter."""
        found = detect_windows(self.network, [collate_live(clips)], device=self.device)
        return {key: self.selection.before(one, self.config.suppression) for key, one in found.items()}


def detect_in_files(
    look: Look, names: Mapping[Source, str], *, progress: Progress | None = None
) -> Iterator[FoundInVideo | Rejection]:
    """What is found in each file, or why it cannot be used, as soon as it is known, in the order of `names`."""
    progress = progress or Progress(0, shown=False)
    sizes = weights_of(names)
    before = 0  # of the files that are done
    # Each file begins anew at Opened and Closed; here for the type checker.
    duration, windows, waiting = 0.0, Windows(), list[LiveClip]()
    for event in watch(names, look.config.data.clips, max_damaged=look.max_damaged):
        match event:
            case Fetching(path, share):
                progress.to(before, f"{names[path]}, {share:.0%} fetched")
            case Opened(path, duration):
                windows, waiting = {}, []
            case Seen(clip):
                waiting.append(clip)
                if len(waiting) == look.batch_size:
                    windows |= look.at(waiting)
                    waiting = []
                # By what has been seen of this file, as its windows may be few and long.
                end = clip.timeline.to_seconds(clip.mask.sum().item())
                progress.to(before + sizes[path] * end / duration, names[path])
            case Closed(path, reason):
                before += sizes[path]
                if reason is None:
                    # A smaller batch: what is found in a file does not wait for the next one.
                    windows |= look.at(waiting) if waiting else {}
                    yield _merged(look, path, names[path], duration, windows)
                else:
                    yield Rejection(names[path], reason)
                windows, waiting = {}, []
                progress.to(before, names[path])


def weights_of(files: Iterable[Source]) -> dict[Source, int]:
    """How much of the work each file is: its bytes, which are known at once, unlike its seconds. Files at addresses
    are not asked for their size: then all count alike."""
    files = list(files)
    if any(isinstance(one, Address) for one in files):
        return dict.fromkeys(files, 1)
    return {path: path.stat().st_size if path.exists() else 0 for path in files if isinstance(path, Path)}


def _merged(look: Look, path: Source, name: str, duration_seconds: float, windows: Windows) -> FoundInVideo | Rejection:
    try:
        # One video's windows, so that one video comes out.
        (found,) = merge_windows(windows, suppression=look.config.suppression).values()
    except ValueError as error:  # numbers that are not finite
        return Rejection(name, str(error).removeprefix(f"video {str(path)!r}: "))
    chosen: Detections = look.selection.after(found)
    file = path if isinstance(path, Path) else None
    return FoundInVideo(name, file, duration_seconds, chosen, tuple(look.network.classes))
