"""A trained detector as an object: open its folder, show it videos, get actions in seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from re2tal.config import RunConfig
from re2tal.data.addresses.address import Source, as_address
from re2tal.data.contract.manifest import Rejection
from re2tal.data.streaming.live import LiveClip, live_clips, shaped
from re2tal.data.streaming.windowing import ResizeWhole, Slide
from re2tal.detector import TemporalActionDetector
from re2tal.evaluation.selection import Selection, Settling, labels_of
from re2tal.reporting.found import FoundAction, found_actions
from re2tal.runs.detection_sources import batch_of, check_looks_at_videos
from re2tal.runs.devices import named_device
from re2tal.runs.file_detection import Look, detect_in_files
from re2tal.runs.model_folder import SHIPPED, read_card, save_model
from re2tal.runs.model_folder_card import Origin, model_card
from re2tal.runs.model_folder_hub import find_model, push_folder
from re2tal.runs.trained import open_detector, started
from re2tal.runs.video_files import encoding_for
from re2tal.runs.watching import Closed, Fetching, Opened, Seen, watch
from re2tal.structures import Detections, Timeline
from re2tal.training.config import DTYPES
from re2tal.training.export import facts_of

# Resized together: more would delay the first action, fewer would cost a call a frame.
FRAMES_AT_ONCE = 16
NEAR_WINDOWS = 2
"""A stream's windows are so many windows' lengths after time 0 of the float32 seconds that a network computes with."""


@dataclass(frozen=True, slots=True)
class Detector:
    """A trained detector on a device; `load_detector` makes it."""

    network: TemporalActionDetector
    """The network with its trained weights."""
    config: RunConfig
    """The run that trained it."""
    device: torch.device
    """Where the network lies."""
    batch_size: int
    """Clips in one forward."""
    card: str | None = None
    """The model card of the folder it comes from."""

    @classmethod
    def from_pretrained(
        cls,
        name: Path | str,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
    ) -> Detector:
        """As `load_detector`, under the name that the hub's libraries give it."""
        return load_detector(name, revision=revision, device=device, batch_size=batch_size)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the detector as it is into a model folder, which names no place of this machine.

        Weights are those that it computes with, stored as float32. Raises ValueError for the folder of a training run.
        """
        card = self.card or model_card(self.config, self.classes, Origin("Not known: saved without a card."))
        weights = {
            name: value.detach().cpu().float().contiguous() if value.is_floating_point() else value.cpu().contiguous()
            for name, value in self.network.state_dict().items()
        }
        facts = facts_of(self.network, features=None)
        save_model(Path(folder), started(self.config), weights, **facts, card=card)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        message: str = "Add a detector of re2tal",
    ) -> str:
        """Put the detector on the hub as OWNER/NAME, which is made if need be; returns the address of the commit.

        Raises ValueError where the hub refuses, or cannot be reached.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(Path(folder), name, private=private, token=token, revision=revision, message=message)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of what it can find."""
        return tuple(self.network.localizer.classes)

    @property
    def frames_per_second(self) -> float | None:
        """The rate of the frames that `stream` takes; None for a model that takes a video as a whole."""
        windowing = self.config.data.clips.windowing
        return windowing.frames_per_second if isinstance(windowing, Slide) else None

    def detect(
        self, video_path: Path | str, *, min_score: float = 0.0, top: int | None = None, classes: Sequence[str] = ()
    ) -> list[FoundAction]:
        """Find the actions in a video file of any format, size and length, the surest first: as `re2tal detect`.

        Args:
            video_path: the file, or its address
            min_score: leave out actions with a lower score
            top: at most so many, the surest ones
            classes: only these; all if none is named

        Example:
            for action in re2tal.load_detector("runs/demo").detect("party.mp4"):
                print(f"{action.start_seconds:.1f} to {action.end_seconds:.1f} s: {action.label} ({action.score:.2f})")

        Raises:
            ValueError: the file cannot be used, with the reason; or an argument is wrong.
        """
        path = _existing(video_path)
        selection = Selection(min_score, top, labels_of(self.classes, classes))
        (found,) = detect_in_files(self._look(selection), {path: path.stem})
        if isinstance(found, Rejection):
            raise ValueError(f"{path} cannot be used: {found.reason}")
        return found.actions

    def stream(
        self, video: Path | str | Iterable[np.ndarray | Tensor], *, min_score: float = 0.1, classes: Sequence[str] = ()
    ) -> Iterator[FoundAction]:
        """Find actions while a video is still coming in; it need never end.

        An action is yielded as soon as no later window can change it: when it, and all that overlap with it, end a
        window's length before the newest window. What a later window says of times before that is cut off. Actions
        come about in order of time. At the end of the video what is left is yielded. Over a whole file, actions are
        those of `detect(video, min_score=min_score)`, unless the network finds actions that reach back further than a
        window, or suppression limits their number (suppression.max_per_video then holds for each group of overlapping
        actions, not for the video) or lets actions vote (suppression.voting_threshold).

        Args:
            video: a video file, or its address; or frames (H, W, 3) uint8 RGB, all of one size, at `frames_per_second`
            min_score: leave out actions with a lower score; the higher it is, the sooner actions are final
            classes: only these; all if none is named

        Raises:
            ValueError: the file or a frame cannot be used, or the model takes only whole videos and this is none.
        """
        selection = Selection(min_score, None, labels_of(self.classes, classes))
        clips = self.config.data.clips
        if isinstance(video, str | Path):
            return self._stream(self._clips_of_file(_existing(video)), selection)
        assert isinstance(clips.windowing, ResizeWhole | Slide)
        if (rate := self.frames_per_second) is None:
            encoding_for(clips)  # raises where the rate is not known
            raise ValueError(
                "this model takes a video as a whole (data.clips.windowing is resize_whole), not frame by frame; give "
                "stream a video file"
            )
        pieces = self._pieces(iter(video))
        return self._stream(live_clips(pieces, clips.windowing, frames_per_second=rate), selection)

    def _look(self, selection: Selection) -> Look:
        return Look(self.network, self.config, self.device, self.batch_size, selection)

    def _clips_of_file(self, path: Source) -> Iterator[LiveClip]:
        for event in watch([path], self.config.data.clips):
            match event:
                case Opened() | Fetching():
                    pass
                case Seen(clip):
                    yield clip
                case Closed(_, reason) if reason is not None:
                    raise ValueError(f"{path} cannot be used: {reason}")

    def _pieces(self, frames: Iterator[np.ndarray | Tensor]) -> Iterator[Tensor]:
        clips, shape = self.config.data.clips, None
        while some := list(islice(frames, FRAMES_AT_ONCE)):
            for frame in some:
                # The first frame says what all have to be.
                shape = shape or tuple(frame.shape)
                if len(shape) != 3 or shape[2] != 3 or tuple(frame.shape) != shape or str(frame.dtype)[-5:] != "uint8":
                    raise ValueError(
                        f"a frame has shape {tuple(frame.shape)} and type {frame.dtype}; give (H, W, 3) uint8, all of "
                        "one size"
                    )
            yield shaped(torch.stack([torch.as_tensor(frame) for frame in some]), size=clips.size, fit=clips.fit)

    def _stream(self, clips: Iterator[LiveClip], selection: Selection) -> Iterator[FoundAction]:
        look, settling, end_seconds = self._look(selection), None, 0.0
        for clip in clips:
            window = clip.timeline
            length = window.seconds_per_step * len(clip.mask)
            # Only now: how far a window reaches is known from the first clip.
            settling = settling or Settling(self.config.suppression, selection, reach_seconds=length)
            # float32 has steps of 8 ms after a day, so times are counted from near the window.
            origin = max(0.0, window.start_seconds - NEAR_WINDOWS * length)
            near = Timeline(
                # A Timeline refuses a duration of 0.
                window.start_seconds - origin,
                window.seconds_per_step,
                max(window.duration_seconds - origin, 1e-6),
            )
            (found,) = look.at([clip._replace(timeline=near)]).values()
            end_seconds = window.duration_seconds
            # Back to the video's own time, in float64.
            found = replace(found, segments=found.segments.double() + origin)
            yield from self._named(settling.add(found, window_seconds=window.start_seconds))
        if settling is not None:
            yield from self._named(settling.end(duration_seconds=end_seconds))

    def _named(self, detections: Detections) -> list[FoundAction]:
        return found_actions(detections, self.classes)


def _existing(given: Path | str) -> Source:
    if (address := as_address(given)) is not None:
        return address
    path = Path(given)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a video file")
    return path


def load_detector(
    folder: Path | str | None = None,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
) -> Detector:
    """Open a trained detector.

    Args:
        folder: a model folder, or the run folder of a training run: config.json and model.safetensors, as `train` or
            `re2tal import` wrote them. Of a run that has not ended, its newest sound checkpoint is taken. Or a model's
            name on the hub, OWNER/NAME. By default the small model that comes with the package.
        revision: of a model on the hub: branch, tag or commit
        device: "cpu", "cuda", "cuda:1", ...; by default an accelerator if there is one
        batch_size: clips in one forward; by default as in training

    Example:
        detector = re2tal.load_detector("runs/demo")
        actions = detector.detect("party.mp4")
    """
    trained = open_detector(SHIPPED if folder is None else find_model(folder, revision=revision))
    config = trained.config
    check_looks_at_videos(trained.folder, config, asked="a detector for video files")
    chosen = named_device(device)
    clips = batch_of(batch_size, config)
    network = trained.network().to(chosen, DTYPES[config.engine.precision])
    return Detector(network, config, chosen, clips, read_card(trained.folder))
