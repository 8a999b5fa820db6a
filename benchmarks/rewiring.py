"""From a trained plain detector to a reversible one: how far off each way starts, what it keeps, where training ends.

    bash launch/quickstart.sh
    python benchmarks/rewiring.py [--depths 2 6 2] [--plain FILE] [--form NAME ...] [--quick] [--json FILE]

The plain detector is the demo's with `depths` blocks a stage. It starts from the weights of the quickstart's detector,
with blocks beyond those adding nothing, and is trained plain until all of them do (or is read from FILE, where it is
kept). Its weights go into each of FORMS, and all are trained on alike.

    gap      relative difference of the backbone's features from the plain network's, before any training
    mAP      average over the demo's thresholds, before and after; "plain" is trained on in the same way
    memory   peak live bytes of forward and backward of the backbone, less parameters and gradients, x plain; where beta
             is annealed, at the start and at the end

One process, one seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from re2tal.backbones.swin3d.network import SIZES, VideoSwin
from re2tal.config import RunConfig
from re2tal.data.contract.shards import ShardSet, open_shards
from re2tal.data.streaming.stream import ClipStream, stream_clips
from re2tal.data.streaming.transforms import normalise
from re2tal.detector import TemporalActionDetector
from re2tal.evaluation.average_precision import mean_average_precision
from re2tal.evaluation.matching import match_predictions
from re2tal.inference import predict
from re2tal.localizers import build_localizer
from re2tal.recipes.presets import demo
from re2tal.reversible.live_bytes import LiveBytes
from re2tal.rewire import RewiringConfig, rewire
from re2tal.rewire.beta import set_beta
from re2tal.strict_json import write_json
from re2tal.training.optimizer import OptimizerConfig, build_optimizer
from re2tal.training.schedule import ScheduleConfig, learning_rate_factor

BATCH = 8
GROWING = OptimizerConfig(learning_rate=1e-3, backbone_learning_rate=1e-3)
TUNING = OptimizerConfig(learning_rate=5e-4, backbone_learning_rate=5e-4)


@dataclass(frozen=True)
class Form:
    """A way from the plain network to a reversible one."""

    rewiring: RewiringConfig | None
    """None leaves the network plain."""
    anneal: bool = False
    """Whether beta goes from 0 to 1, evenly, over the first two thirds of the training."""


FORMS = {
    "plain": Form(None),
    "branches, mean (the paper's)": Form(RewiringConfig()),
    "branches, extrapolate": Form(RewiringConfig(merge="extrapolate")),
    "branches, extrapolate, segments of 4": Form(RewiringConfig(merge="extrapolate", segment=4)),
    "branches, extrapolate, segments of 2": Form(RewiringConfig(merge="extrapolate", segment=2)),
    "blocks, mean": Form(RewiringConfig(unit="block")),
    "blocks, extrapolate": Form(RewiringConfig(unit="block", merge="extrapolate")),
    "blocks, extrapolate, segments of 2": Form(RewiringConfig(unit="block", merge="extrapolate", segment=2)),
    "annealed, mean": Form(RewiringConfig(), anneal=True),
    "annealed, extrapolate": Form(RewiringConfig(merge="extrapolate"), anneal=True),
}


@dataclass(frozen=True)
class Bench:
    """What all forms have in common."""

    run: RunConfig
    depths: tuple[int, ...]
    training: ShardSet
    validation: ShardSet

    def detector(self, form: Form) -> TemporalActionDetector:
        """Random weights."""
        torch.manual_seed(0)
        backbone = VideoSwin(**SIZES["swin3d_nano"] | {"depths": self.depths})
        if form.rewiring is not None:
            rewire(backbone, config=form.rewiring)
        localizer = build_localizer(
            self.run.localizer, in_channels=backbone.out_channels, classes=self.training.classes
        )
        return TemporalActionDetector(backbone, localizer, num_steps=self.run.num_steps)

    def grown(self, start: dict[str, Tensor]) -> TemporalActionDetector:
        """A plain detector with the weights `start` of a shallower one; further blocks add nothing yet."""
        detector = self.detector(FORMS["plain"])
        missing, unexpected = detector.load_state_dict(start, strict=False)
        if unexpected or any(".blocks." not in name for name in missing):
            raise ValueError(
                f"these weights are not of a shallower one of this detector: {[*missing, *unexpected][:5]}"
            )
        with torch.no_grad():
            for name in missing:
                if ".attn.proj." in name or ".mlp.fc2." in name:
                    detector.get_parameter(name).zero_()
        return detector

    def stream(self, *, training: bool, seed: int = 0) -> ClipStream:
        """The demo's clips."""
        shards = self.training if training else self.validation
        return stream_clips(shards, self.run.data.clips, batch_size=BATCH, training=training, seed=seed)

    def train(
        self, detector: TemporalActionDetector, form: Form, optimizer: OptimizerConfig, *, epochs: int, seed: int
    ) -> None:
        """AdamW, half a cosine."""
        clips = self.stream(training=True, seed=seed)
        num_steps = epochs * clips.steps_per_epoch
        adam = build_optimizer(detector, optimizer)
        factor = learning_rate_factor(
            ScheduleConfig(warmup_epochs=0), steps_per_epoch=clips.steps_per_epoch, num_steps=num_steps
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, factor)
        detector.train()
        for epoch in range(epochs):
            for index, batch in enumerate(clips.epoch(epoch)):
                if form.anneal:
                    set_beta(detector, min(1.0, 1.5 * (epoch * clips.steps_per_epoch + index) / num_steps))
                outputs = detector(normalise(batch.frames), batch.mask)
                loss = detector.loss(outputs, batch.actions, batch.timelines, num_frames=batch.frames.shape[2])["total"]
                adam.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
                adam.step()
                schedule.step()
            print(f"  epoch {epoch + 1}/{epochs}  loss {loss.item():.3f}", file=sys.stderr, flush=True)
        if form.anneal:
            set_beta(detector, 1.0)

    def score(self, detector: TemporalActionDetector) -> float:
        """Average mAP."""
        found = predict(detector, self.stream(training=False).epoch(0), suppression=self.run.suppression, device="cpu")
        return mean_average_precision(
            match_predictions(
                found,
                [video.record for video in self.validation.videos],
                classes=detector.localizer.classes,
                protocol=self.run.evaluation.protocol,
                tiou_thresholds=self.run.evaluation.tiou_thresholds,
            )
        ).average_map

    def features(self, detector: TemporalActionDetector) -> Tensor:
        """Of the first validation clips."""
        batch = next(iter(self.stream(training=False).epoch(0)))
        detector.eval()
        with torch.no_grad():
            return detector.backbone(normalise(batch.frames), batch.mask).values

    def peak_bytes(self, detector: TemporalActionDetector) -> int:
        """Of a forward and backward of the backbone on the first validation clips."""
        batch = next(iter(self.stream(training=False).epoch(0)))
        for parameter in detector.backbone.parameters():
            parameter.grad = torch.zeros_like(parameter)
        frames = normalise(batch.frames)
        with LiveBytes() as live:
            detector.backbone(frames, batch.mask).values.square().mean().backward()
        detector.zero_grad()
        return live.peak


def compare(
    bench: Bench, plain: dict[str, Tensor], names: Sequence[str], *, epochs: int
) -> dict[str, dict[str, float]]:
    """Prints a row for each form, and returns them."""
    rows: dict[str, dict[str, float]] = {}
    unchanged = bench.detector(FORMS["plain"])
    unchanged.load_state_dict(plain)
    reference, whole = bench.features(unchanged), bench.peak_bytes(unchanged)
    print(f"{'':40}{'gap':>10}{'mAP':>10}{'trained':>10}{'memory':>16}")
    for name in names:
        form = FORMS[name]
        detector = bench.detector(form)
        detector.load_state_dict(plain)
        peaks = []
        for beta in (1.0, 0.0) if form.anneal else (None,):
            if beta is not None:
                set_beta(detector, beta)
            peaks.append(bench.peak_bytes(detector))
        rows[name] = {
            "gap": float((bench.features(detector) - reference).norm() / reference.norm()),
            "map_before": bench.score(detector),
        }
        bench.train(detector, form, TUNING, epochs=epochs, seed=1)
        memory = [peak / whole for peak in reversed(peaks)]
        rows[name] |= {"map_after": bench.score(detector), "memory_vs_plain": memory[-1]}
        row, shown = rows[name], " to ".join(f"{share:.3f}" for share in memory)
        print(f"{name:40}{row['gap']:10.1e}{row['map_before']:10.1%}{row['map_after']:10.1%}{shown:>16}", flush=True)
    return rows


def main() -> None:
    """Trains, compares, prints, writes."""
    run = demo()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=Path, default=run.data.shards, help="of the demo's videos")
    parser.add_argument("--start", type=Path, default=Path("runs/quickstart/model.safetensors"))
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 6, 2], help="blocks of each stage")
    parser.add_argument("--plain", type=Path, help="safetensors file of the plain detector: read, or else written")
    parser.add_argument("--form", action="append", choices=list(FORMS), help="only these; may be repeated")
    parser.add_argument("--growing-epochs", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=3, help="of training each form")
    parser.add_argument("--quick", action="store_true", help="one epoch of everything")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    growing, epochs = (1, 1) if arguments.quick else (arguments.growing_epochs, arguments.epochs)
    training, validation = (open_shards(arguments.shards / name) for name in ("training", "validation"))
    run = replace(run, data=replace(run.data, shards=arguments.shards))
    bench = Bench(run, tuple(arguments.depths), training, validation)
    if arguments.plain and arguments.plain.is_file():
        plain = load_file(arguments.plain)
    else:
        detector = bench.grown(load_file(arguments.start))
        bench.train(detector, FORMS["plain"], GROWING, epochs=growing, seed=0)
        plain = {name: value.clone() for name, value in detector.state_dict().items()}
        if arguments.plain:
            save_file(plain, arguments.plain)
    rows = compare(bench, plain, arguments.form or list(FORMS), epochs=epochs)
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
