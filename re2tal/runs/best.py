"""The best model so far of a run that keeps it (training.keep_best), chosen on the subset that it is scored on.

RUN/best/best.json               which evaluation it is of, and the figures of all
         step-00000400.safetensors  its weights
         step-00000400.json         its results

best.json is written after the files that it names, so that a crash leaves it with those of an earlier one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from re2tal.config import AnyRun, to_json
from re2tal.data.contract.shards import FeatureSet, ShardSet
from re2tal.distributed import made_by_main
from re2tal.runs.folder import LAST_MODEL_NAME
from re2tal.runs.stored_features import describe
from re2tal.runs.tasks import Outcome, judge_again
from re2tal.strict_json import read_json, write_json
from re2tal.training.checkpoint_files import with_retries
from re2tal.training.deepspeed_import import Engine
from re2tal.training.engine_weights import gather_weights
from re2tal.training.export import facts_of, read_model, write_model

POINTER = "best.json"


@dataclass(frozen=True)
class BestModel:
    """Of one run, in a folder of its own."""

    folder: Path
    config: AnyRun
    training: ShardSet | FeatureSet
    validation: ShardSet | FeatureSet
    """On which it is evaluated."""

    @property
    def scored(self) -> dict[str, Any]:
        """What figures depend on beside the weights: those of other videos or rules do not compare."""
        # Suppression too: it decides what is found at all.
        rules = {name: to_json(self.config).get(name) for name in ("suppression", "evaluation")}
        return {"shards": self.validation.manifest_sha256, **rules}

    def start(self, *, step: int, say: Callable[[str], None]) -> None:
        """Every rank calls this before it trains on from `step`: forgets evaluations that no longer count."""

        def keep() -> None:
            if not (known := self.read()):
                return
            if known["scored"] != self.scored:
                say("the best model so far was scored on other videos or by other rules, and is forgotten")
                (self.folder / POINTER).unlink()
            # The run goes on from before it, and may not come to these weights again.
            elif known["step"] > step:
                say(f"the best model so far, of step {known['step']}, is of steps to be trained again; it is forgotten")
                (self.folder / POINTER).unlink()
            else:
                # Keys are texts in JSON, steps numbers here.
                figures = {name: value for name, value in known["figures"].items() if int(name) <= step}
                write_json(self.folder / POINTER, known | {"figures": figures})

        made_by_main(keep)

    def offer(self, outcome: Outcome, engine: Engine, *, step: int) -> None:
        """Every rank calls this with the evaluation of the weights that the engine has now."""
        by, value = outcome.merit
        if made_by_main(lambda: with_retries(lambda: self._is_beaten(by, value, step))):
            return
        # By all ranks, as it gathers shards; only rank 0 writes.
        weights, model = gather_weights(engine), engine.module
        features = describe(self.training) if isinstance(self.training, FeatureSet) else None

        def write() -> None:
            self.folder.mkdir(exist_ok=True)
            path = self.folder / f"step-{step:08d}.safetensors"
            write_model(path, weights, **facts_of(model, features=features))
            outcome.write(path.with_suffix(".json"))
            figures = {**(self.read() or {"figures": {}})["figures"], str(step): value}
            known = {"step": step, "by": by, "figures": figures, "scored": self.scored}
            write_json(self.folder / POINTER, known)
            # After the pointer: a crash until here leaves one file too many, and none too few.
            for old in self.folder.glob("step-*"):
                if old.stem != path.stem:
                    old.unlink()

        made_by_main(lambda: with_retries(write))

    def read(self) -> dict[str, Any] | None:
        """What best.json says; None before the first evaluation."""
        path = self.folder / POINTER
        return read_json(path) if path.is_file() else None

    @property
    def results(self) -> Path:
        """What the best evaluation found; its weights lie beside it."""
        known = self.read()
        assert known is not None
        return self.folder / f"step-{known['step']:08d}.json"

    def outcome(self) -> Outcome:
        """The best evaluation once more, from its results."""
        return judge_again(self.results, config=self.config, shards=self.validation)

    def export(self, path: Path) -> None:
        """Write the best model as that of the run."""
        # Read and written anew, not copied: the header is that of this version.
        best = read_model(self.results.with_suffix(".safetensors"))
        write_model(path, best.weights, **best.facts)

    def chosen(self, *, last: float, steps_per_epoch: float) -> dict[str, Any]:
        """Which evaluation it is of, for summary.json; `last` is the figure of the last weights."""
        known = self.read()
        assert known is not None
        by, step, figures = known["by"], known["step"], known["figures"]
        epoch = step / steps_per_epoch
        note = (
            f"the model is that of epoch {epoch:g}, the best of {len(figures)} evaluations by {by}, chosen on the very "
            f"videos that it is scored on, so its figures are biased upwards; the last weights ({LAST_MODEL_NAME}) "
            f"reach {100 * last:.2f} %"
        )
        return {"by": by, "epoch": epoch, "step": step, "figures": figures, "last": last, "note": note}

    def _is_beaten(self, by: str, value: float, step: int) -> bool:
        """Whether another evaluation did better; notes the figure of this one if so. The earlier of two equals wins."""
        known = self.read()
        # The same step once more: the run was stopped while it wrote, and evaluates again.
        if known is None or known["by"] != by or known["step"] == step or value > known["figures"][str(known["step"])]:
            return False
        write_json(self.folder / POINTER, known | {"figures": {**known["figures"], str(step): value}})
        return True
