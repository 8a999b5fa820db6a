"""The training loop.

    draw -> loss -> backward  (x gradient accumulation)  -> step -> average -> report, evaluate, save, stop?

Every rank runs the same steps: their number is known before the first batch, and whether to skip a batch or to stop is
decided by all ranks together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from re2tal.distributed import made_by_main
from re2tal.rewire import set_beta
from re2tal.structures import Batch
from re2tal.training.agreement import refuse_drifted_replicas
from re2tal.training.checkpoint import CheckpointStore
from re2tal.training.config import TrainingConfig
from re2tal.training.deepspeed_import import Engine
from re2tal.training.ema import WeightAverage
from re2tal.training.generators import seed_draws
from re2tal.training.interruption import Interrupted, StopVote
from re2tal.training.manifest import TrainingProgress
from re2tal.training.metrics import MetricsLog
from re2tal.training.micro_batch import MicroBatch, forward
from re2tal.training.schedule import PeakRates, num_optimizer_steps
from re2tal.training.signals import stop_requests
from re2tal.training.skips import Skips
from re2tal.training.step_report import StepReport
from re2tal.training.watchdog import at


class Clips(Protocol):
    """A stream of batches; `re2tal.data.streaming.stream` has the real one."""

    steps_per_epoch: int

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, the same ones from any `start_step`."""


Prepare = Callable[[Batch, int], Tensor]
"""A batch on the device, its number in the run -> what the detector takes, in the weights' type: frames
(B, 3, T, H, W), augmented and normalised, or features (B, C, T)."""

Validate = Callable[[Engine], Mapping[str, float]]
"""Every rank calls it; figures of merit by name. It leaves the engine in the mode it came in, also where it raises
Interrupted on all ranks, which were told to stop."""


class Trainer:
    """Trains the detector, or recognizer, inside a DeepSpeed engine on a stream of clips."""

    def __init__(
        self,
        engine: Engine,
        clips: Clips,
        validate: Validate,
        config: TrainingConfig,
        *,
        prepare: Prepare,
        checkpoints: CheckpointStore,
        log: MetricsLog,
        beta: Callable[[int], float] | None = None,
        planned_bytes: int | None = None,
        new_step: Callable[[], None] = lambda: None,
    ) -> None:
        """`beta`: optimizer steps done -> beta of a rewired network from there on; None leaves it as it is.
        `planned_bytes`: the peak that a plan foresees, for the log to show beside the measured one.
        `new_step`: called before the first batch of every optimizer step."""
        self.engine = engine
        self.clips = clips
        self.validate = validate
        self.config = config
        self.prepare = prepare
        self.checkpoints = checkpoints
        self.log = log
        self.beta = beta
        self.new_step = new_step
        self.accumulation = int(engine.gradient_accumulation_steps())
        self.steps_per_epoch = clips.steps_per_epoch / self.accumulation  # not whole where a step spans two epochs
        self.num_steps = num_optimizer_steps(config.epochs, clips.steps_per_epoch, accumulation=self.accumulation)
        decay = config.average_decay
        self.average = None if decay is None else WeightAverage(engine, decay=decay)
        self.progress = TrainingProgress()
        self.skips = Skips(engine, log, max_non_finite=config.max_non_finite)
        self.report = StepReport(
            engine, log, steps_per_epoch=self.steps_per_epoch, beta=beta, planned_bytes=planned_bytes
        )
        self._waited = 0.0
        self._saved_step = -1
        self.warm = False

    def resume(self) -> bool:
        """Every rank calls this: continues from the newest sound checkpoint; False where there is none.

        ValueError where the run is shorter now than what it has trained already.
        """
        # Before loading, which replaces them by the checkpoint's: a rate that was changed for the resumed run has to
        # win.
        peaks = PeakRates.of(self.engine.lr_scheduler)
        restored = self.checkpoints.load_newest(self.engine, self.average)
        if restored is None:
            return False
        if restored.step > self.num_steps:
            trained = -(-restored.step * self.accumulation // self.clips.steps_per_epoch)
            raise ValueError(
                f"training.epochs is {self.config.epochs}, which is {self.num_steps} steps, but the checkpoint has "
                f"taken {restored.step}; give {trained} epochs or more, or start another run from this one "
                "(--start-from)"
            )
        self.progress = restored
        before, after = peaks.apply(self.engine.lr_scheduler, step=restored.step)
        for name, (old, new) in self.checkpoints.changed.items():
            self.log.say(f"from here on {name} is {new}, it was {old}")
        if before != after:
            self.log.say(f"the next step's learning rate is {after:.3g}; as the run was before, {before:.3g}")
        self._couple()
        return True

    def train(self) -> Literal["finished", "interrupted"]:
        """Every rank calls this: trains to the last step, or until a rank is told to stop, and saves in either case."""
        self.log.open(step=self.progress.step, num_steps=self.num_steps)
        self.engine.train()
        self._couple()
        with stop_requests() as requests:
            # Signals reach ranks at different times: all ranks agree, or some would save while others train.
            ranks = StopVote(requests, self.engine.device)
            # A checkpoint may stand before an evaluation that was left for it.
            stop = ranks.told() or (self._evaluation_is_left() and not self.evaluate())
            batches = self._batches()
            while self.progress.step < self.num_steps and not stop:
                started = time.perf_counter()
                self._waited = 0.0
                losses = self._step(batches)
                self.report.add(losses, seconds=time.perf_counter() - started, waited=self._waited)
                self._advance(seconds=time.perf_counter() - started)
                self._report()
                stop = ranks.told()
                if self._evaluation_is_due() and not stop:
                    if self.config.keep_best:
                        # A run that goes on from before the best evaluation might not come to these weights again.
                        self._save()
                    # An evaluation takes minutes, and a job that was told to stop has few.
                    stop = not self.evaluate() or ranks.told()
                if stop or self._last() or self.progress.step % self.config.checkpoint_every_steps == 0:
                    self._save()
                    stop = stop or ranks.told()  # `stop` is agreed, so all ranks ask, or none does
            batches.close()  # ends the stream's worker processes
        return "finished" if self._last() else "interrupted"

    def evaluate(self) -> bool:
        """Every rank calls this: validates with the averaged weights, if there are any, and logs the figures.

        False when all ranks were told to stop before it was done.
        """
        try:
            with self.averaged_weights():
                figures = self.validate(self.engine)
        except Interrupted:
            return False
        self.log.write("evaluation", figures, step=self.progress.step)
        return True

    def _evaluation_is_left(self) -> bool:
        """Every rank calls this: whether the evaluation after the last step was due, but is not in the log."""
        if not self.progress.step or not self._evaluation_is_due():
            return False
        # Only rank 0 has the log.
        return made_by_main(lambda: not self.log.has("evaluation", step=self.progress.step))

    def averaged_weights(self) -> AbstractContextManager[None]:
        """A context in which the model computes with the weights to evaluate and to export."""
        return nullcontext() if self.average is None else self.average.in_place_of_weights()

    # --------------------------------------------------------------------------------------------------------- one step

    def _step(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """Takes one optimizer step; returns the mean of its losses, by name.

        If a loss is not finite, the step is taken again with the batches that follow.
        """
        while True:
            self.skips.watch.new_step()
            self.new_step()
            micro_batches = [self._micro_batch(batches) for _ in range(self.accumulation)]
            if self.engine.was_step_applied():
                # Only now: after a skipped step the weights are the old ones, and would count twice.
                self.skips.applied()
                if self.average is not None:
                    self.average.update()
                break
            self.progress = replace(self.progress, skipped=self.progress.skipped + 1)
            # Without a loss the step is taken again. If only gradients were not finite it counts: weights stay as they
            # were, and the learning rate, which DeepSpeed leaves too, goes on with the step.
            if not self.skips.is_lost(micro_batches, step=self.progress.step):
                self.engine.lr_scheduler.step()
                break
        for one in micro_batches:
            self.report.watch.add(self.progress.step, one.losses["total"], one.video_ids)
        # They stay on the device: a number in Python would make every step wait for it.
        losses = [one.losses for one in micro_batches]
        return {name: torch.stack([each[name] for each in losses]).mean() for name in losses[0]}

    def _micro_batch(self, batches: Iterator[Batch]) -> MicroBatch:
        """Forward and backward of the next batch and, with the last of a step, the step itself."""
        at(f"step {self.progress.step}, waiting for its loader", patient=not self.warm)
        asked = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - asked
        self.skips.watch.new_batch(batch.video_ids)
        micro_batch = self._forward(batch)
        # Applied or not: a resumed run must not draw the batches of a skipped step again.
        self.progress = replace(self.progress, micro_batches=self.progress.micro_batches + 1)
        at(f"step {self.progress.step}, backward", patient=not self.warm)
        self.engine.backward(micro_batch.total)
        self.engine.step()
        return micro_batch.detached()

    def _forward(self, batch: Batch) -> MicroBatch:
        at(f"step {self.progress.step}, forward", patient=not self.warm)  # the first one may compile
        batch = batch.to(self.engine.device)
        # By the batch's place in the run alone: on other ranks, or resumed, the same clips drop the same paths.
        number = self.progress.micro_batches * int(self.engine.world_size) + int(self.engine.global_rank)
        seed_draws(self.config.seed, number)
        return forward(self.engine, batch, self.prepare(batch, self.progress.micro_batches))

    def _batches(self) -> Generator[Batch]:
        """Batches without end, from where the run stands."""
        while True:
            epoch, start_step = divmod(self.progress.micro_batches, self.clips.steps_per_epoch)
            yield from self.clips.epoch(epoch, start_step=start_step)

    # ---------------------------------------------------------------------------------------------------- around a step

    def _advance(self, *, seconds: float) -> None:
        self.progress = replace(self.progress, step=self.progress.step + 1, seconds=self.progress.seconds + seconds)
        self.warm = True
        self._couple()  # so that what is evaluated next is the network that the next step trains
        self.log.advance()

    @property
    def is_annealed(self) -> bool:
        """Whether a rewired network is coupled as it will be at the end."""
        return self.beta is None or self.beta(self.progress.step) == self.beta(self.num_steps)

    def _couple(self) -> None:
        """Sets the coupling of a rewired network, which depends on the step alone."""
        if self.beta is not None:
            set_beta(self.engine.module, self.beta(self.progress.step))

    def _report(self) -> None:
        if self.progress.step % self.config.log_every_steps and not self._last():
            return
        refuse_drifted_replicas(self.engine, step=self.progress.step)
        self.report.write(self.progress)

    def _evaluation_is_due(self) -> bool:
        """True if the step just done completed an epoch to evaluate after, unless it is the last step."""
        epochs, before = self.config.evaluate_every_epochs, self.config.evaluate_from_epoch
        done = self.progress.step * self.accumulation
        if epochs is None or self._last() or done < before * self.clips.steps_per_epoch:
            return False
        micro_batches = epochs * self.clips.steps_per_epoch
        # Not `done % micro_batches == 0`: where accumulation does not divide an epoch, a step lies across its end.
        return done // micro_batches > (done - self.accumulation) // micro_batches

    def _save(self) -> None:
        """Every rank calls this: a checkpoint of this step, if there is none yet."""
        # `keep_best` and the interval may ask for the same step.
        if self._saved_step != self.progress.step:
            self.checkpoints.save(self.engine, self.average, self.progress)
            self._saved_step = self.progress.step

    def _last(self) -> bool:
        return self.progress.step >= self.num_steps
