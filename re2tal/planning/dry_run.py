"""A training step on fake tensors: the bytes alive in each phase of each stage, counted in seconds for any size.

    batch -> | stage 0 | stage 1 | .. | between: resampling, localizer, loss | .. | stage 1 | stage 0 |
             forward                                                          backward

The loss is a sum over the localizer's outputs, in the place of its own, which needs annotations. Sizes are the same.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from re2tal.backbones.clip_memory import ClipMemory
from re2tal.config import AnyRun, RunConfig, build_detector, build_recognizer
from re2tal.detector import TemporalActionDetector
from re2tal.planning.search import Ground
from re2tal.recognizer import Recognizer
from re2tal.reversible.fake import on_fake_tensors
from re2tal.reversible.live_bytes import LiveBytes
from re2tal.rewire import RewiredStage, stages_of
from re2tal.training.config import DTYPES
from re2tal.training.frames import prepare_frames


class Event(NamedTuple):
    """A place in a step."""

    kind: Literal["start", "forward", "between", "backward"]
    stage: int
    """Counted in the order in which stages run; for the other kinds 0."""


@dataclass(frozen=True, slots=True)
class Phase:
    """From one event to the next."""

    event: Event
    live: int
    """Bytes alive when it begins."""
    peak: int
    """The most alive at once in it."""
    gradients: int
    """Of the bytes when it begins, those of parameters' gradients."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A step, phase by phase; bytes on the device, without parameters and what belongs to the optimizer."""

    batch: int
    """Bytes of the clips, as they come and as the backbone gets them."""
    phases: tuple[Phase, ...]
    gradients: int = 0
    """Bytes of the parameters' gradients when backward has ended."""
    prepared_again: int = 0
    """Bytes of the clips that are freed after forward, and prepared again in backward."""
    host: int = 0
    """Most bytes in host memory at once; 0 on a CPU."""

    @property
    def peak(self) -> int:
        """The most alive at once."""
        return max(phase.peak for phase in self.phases)

    def of(self, kind: str) -> list[Phase]:
        """The phases of a kind, by stage."""
        return sorted((phase for phase in self.phases if phase.event.kind == kind), key=lambda one: one.event.stage)

    def kept(self) -> list[int]:
        """By stage: bytes that live from its forward to its backward."""
        begins = [*self.of("forward"), *self.of("between")]
        return [after.live - before.live for before, after in pairwise(begins)]

    def ground(self) -> Ground:
        """Bytes alive whatever the settings of the stages."""
        kept = self.kept()
        between = max(phase.peak for phase in self.of("between"))
        return Ground(
            before=max(phase.peak for phase in self.of("start")),
            forward=tuple(phase.live - sum(kept[:s]) for s, phase in enumerate(self.of("forward"))),
            between=between - sum(kept),
            backward=tuple(phase.live - sum(kept[: s + 1]) for s, phase in enumerate(self.of("backward"))),
        )


class DryRun:
    """The network of a run, with its parameters on fake tensors, and training steps of it."""

    def __init__(self, run: AnyRun, *, device: torch.device, num_classes: int, free_gradients: bool) -> None:
        """`free_gradients`: whether each gradient is freed as soon as it is computed, as under ZeRO 2 and 3."""
        self.run, self.device = run, device
        self.dtype = DTYPES[run.engine.precision]
        # Fake tensors have no numbers to load.
        bare = replace(run, backbone=replace(run.backbone, weights=None))
        classes = [f"class {number}" for number in range(num_classes)]
        self.network, self._mode = on_fake_tensors(partial(_network, bare, classes), dtype=self.dtype, device=device)
        self.parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        if free_gradients:
            for parameter in self.parameters:
                # DeepSpeed does so once it has copied the gradient into its bucket.
                parameter.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
        self._memory = _FullMemory(run.backbone.trained_clips) if run.backbone.trained_clips < 1 else None
        if self._memory is not None:
            self.network.backbone.memory = self._memory  # type: ignore[assignment]
        # Where clips are encoded in groups, stages run once a group: the backbone then counts as one stage.
        self._stages = {} if run.backbone.clips_at_once else stages_of(self.network.backbone)
        # Names come in the order of construction; plans and searches need that of the run, which only a forward shows.
        begun: list[RewiredStage] = []
        with self._mode, torch.no_grad(), ExitStack() as stack:
            for stage in self._stages.values():
                stack.callback(stage.register_forward_pre_hook(lambda stage, _: begun.append(stage)).remove)
            self.network(*self._clips())  # tables that it makes once belong to no step
        self._stages = dict(sorted(self._stages.items(), key=lambda item: begun.index(item[1])))

    def stages(self) -> dict[str, RewiredStage]:
        """The rewired stages of the backbone by name, in the order in which they run."""
        return self._stages

    def trace(self) -> Trace:
        """One step with the stages as they are configured now."""
        for parameter in self.parameters:
            parameter.grad = None
        # Cycles of the step before would still hold its storages, and count as alive.
        gc.collect()
        phases: list[Phase] = []
        begun = Phase(Event("start", 0), 0, 0, 0)

        def mark(event: Event) -> None:
            nonlocal begun
            phases.append(replace(begun, peak=live.peak))
            # The peak begins anew with each phase, from what is alive at that moment.
            begun, live.peak = Phase(event, live.live, 0, self._gradients()), live.live

        stages = list(self._stages.values())
        # On a CPU the two would be one count.
        host, live = LiveBytes(torch.device("cpu")), LiveBytes(self.device)
        with self._mode, host if self.device.type != "cpu" else nullcontext(), live:
            with marking(self.network.backbone, stages, mark):
                outputs = self.network(*self._clips())
                # Looked at between forward and backward: a stage that prepares its input again has let go of it.
                again = self._pixels_bytes if self._pixels() is None else 0
                # In float32, as losses are computed.
                wide = [leaf.float() for leaf in tree_leaves(outputs) if leaf.requires_grad]
                torch.stack([leaf.square().sum() for leaf in wide]).sum().backward()
                # Before the trace ends, as a training step lets go of them too.
                del outputs, wide
        phases.append(replace(begun, peak=live.peak))
        batch = self._frames.nbytes + self._pixels_bytes
        return Trace(batch, tuple(phases), self._gradients(), again, host.peak)

    def _gradients(self) -> int:
        return sum(one.grad.untyped_storage().nbytes() for one in self.parameters if one.grad is not None)

    def _clips(self) -> tuple[Tensor, Tensor]:
        """A batch as the backbone gets it; as in training, the stored one stays alive until the next."""
        clips, size = self.run.data.clips, self.run.data.clips.size
        batch, length = self.run.engine.batch_size, clips.windowing.num_frames
        channels = self.run.backbone.feature_channels
        if channels is not None:
            self._frames = torch.zeros((batch, channels, length), device=self.device)
            pixels = self._frames.to(self.dtype)
        else:
            # uint8, as clips come from the loader.
            self._frames = torch.zeros((batch, 3, length, size, size), dtype=torch.uint8, device=self.device)
            colours = torch.Generator()
            pixels = prepare_frames(self._frames, strength=clips.colour_jitter, generator=colours, dtype=self.dtype)
        if self._memory is not None:
            self._memory.next_batch([None] * batch, seed=0)
        # Of the storage, not of the tensor: views of it may outlive the tensor.
        self._pixels = weakref.ref(pixels.untyped_storage())
        self._pixels_bytes = 0 if pixels is self._frames else pixels.nbytes
        return pixels, torch.ones(batch, length, dtype=torch.bool, device=self.device)


class _FullMemory(ClipMemory):
    """A memory of clips in which all are known, without a folder."""

    def __init__(self, share: float) -> None:
        self.share = share

    def _read(self, video_id: str | None, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape, dtype=np.float32)


def _network(run: AnyRun, classes: Sequence[str]) -> TemporalActionDetector | Recognizer:
    return build_detector(run, classes) if isinstance(run, RunConfig) else build_recognizer(run, classes)[0]


@contextmanager
def marking(backbone: nn.Module, stages: Sequence[nn.Module], mark: Callable[[Event], None]) -> Iterator[None]:
    """Inside, `mark` is called when each stage begins its forward and its backward, and when the backbone is done.

    Stages are numbered in the order in which they run. A backbone without stages, a plain one, counts as one stage.
    RuntimeError if one runs twice.
    """
    order: list[nn.Module] = []
    in_backward: set[Event] = set()

    def begin(stage: nn.Module, args: tuple[Any, ...]) -> None:
        if stage in order:
            raise RuntimeError(
                f"a stage of this {type(backbone).__name__} runs twice in a step, which no plan can hold"
            )
        order.append(stage)
        mark(Event("forward", len(order) - 1))

    def end(stage: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        event = Event("backward", order.index(stage))

        def begin_backward(gradient: Tensor) -> None:
            if event not in in_backward:
                in_backward.add(event)
                mark(event)

        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                # A stage's backward begins when the gradient of its first output is there.
                leaf.register_hook(begin_backward)

    with ExitStack() as stack:
        # Hooks go when the context ends, also after an error: the network is used for further traces.
        for stage in stages or [backbone]:
            stack.callback(stage.register_forward_pre_hook(begin).remove)
            stack.callback(stage.register_forward_hook(end).remove)
        done = backbone.register_forward_hook(lambda *_: mark(Event("between", 0)))
        stack.callback(done.remove)
        yield
