"""What the log says of training: losses, learning rates, speed and memory since the last line."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from re2tal.distributed import any_rank, gather_objects, named_host
from re2tal.rewire import count_states, largest_drift
from re2tal.training.deepspeed_import import Engine
from re2tal.training.jumps import LossWatch
from re2tal.training.manifest import TrainingProgress
from re2tal.training.metrics import Meter, MetricsLog, peak_memory_gib


class StepReport:
    """Gathers the steps of one run, and writes them as one line."""

    def __init__(
        self,
        engine: Engine,
        log: MetricsLog,
        *,
        steps_per_epoch: float,
        beta: Callable[[int], float] | None,
        planned_bytes: int | None,
    ) -> None:
        """`steps_per_epoch`: optimizer steps; `beta` and `planned_bytes` as the trainer's."""
        self.engine = engine
        self.log = log
        self.steps_per_epoch = steps_per_epoch
        self.beta = beta
        self.planned_bytes = planned_bytes
        self.meter = Meter(clips_per_step=int(engine.train_batch_size()))
        self.watch = LossWatch()

    def add(self, losses: dict[str, Tensor], *, seconds: float, waited: float) -> None:
        """One optimizer step; `waited`: how many of its `seconds` this rank waited for the loader."""
        self.meter.add(losses, seconds=seconds, waited=waited)

    def write(self, progress: TrainingProgress) -> None:
        """Every rank calls this: the line of the steps since the last one."""
        losses, speed = self.meter.take(device=self.engine.device)
        self._compare_with_plan()
        self._say_jumps()
        groups = self.engine.optimizer.param_groups
        self.log.write(
            "train",
            {
                "epoch": progress.step / self.steps_per_epoch,
                "loss": losses.pop("total"),
                **{f"loss/{name}": loss for name, loss in losses.items()},
                "lr": max(group["lr"] for group in groups),
                **{f"lr/{group['name']}": group["lr"] for group in groups},
                **self._rewiring(progress.step),
                **speed,
                "peak_memory_gib": peak_memory_gib(self.engine.device),
                "skipped": progress.skipped,
            },
            step=progress.step,
        )

    def _say_jumps(self) -> None:
        """Every rank calls this: names the losses that jumped since the last line."""
        jumps = self.watch.found()
        if any_rank(bool(jumps), device=self.engine.device):
            for rank, (host, of_rank) in enumerate(gather_objects((named_host(), jumps))):
                for jump in of_rank:
                    self.log.say(f"the loss jumped on rank {rank} (host {host}) in {jump}")

    def _rewiring(self, step: int) -> dict[str, float]:
        """Beta and the number of kept states, where beta changes; the monitor's last error of rebuilt states."""
        figures: dict[str, float] = {}
        if self.beta is not None:
            figures |= {"beta": self.beta(step), "kept_states": count_states(self.engine.module).kept}
        if (reading := largest_drift(self.engine.module)) is not None:
            figures |= {"drift": reading.drift, "outside_grid": reading.outside}
        return figures

    def _compare_with_plan(self) -> None:
        """Once, after the first steps."""
        if self.planned_bytes is None:
            return
        measured = peak_memory_gib(self.engine.device) * 2**30 / 1e9
        what = "resident, with libraries and data" if self.engine.device.type == "cpu" else "allocated on the device"
        self.log.say(f"peak memory: {self.planned_bytes / 1e9:.3f} GB planned, {measured:.3f} GB {what}")
        self.planned_bytes = None
