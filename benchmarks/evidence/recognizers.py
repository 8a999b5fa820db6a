"""Recognizers of part `recognition`: trained plain on clips of the demo, rewired, and trained on for a while.

    original             the plain network, trained for all epochs
    rewired              its weights in the rewired network, as they are
    in segments          the same, merged by extrapolation every 2 branches: the original's function, but for the place
                         of SlowFast's ReLUs, and the memory of two states a segment
    ..., + N epochs      trained on for N epochs
    ..., gently          the longest of those at a fifth of the rate, for backbones that the rate harms
    original, + N epochs the plain network trained on for as long as the longest of those
    from scratch         the rewired network, trained like the original

A clip's class is one of six motions: four slides and two senses of a circle. From random weights SlowFast learns them
in 20 epochs, VideoMAE in 40 at half the rate; Video Swin hardly, so it starts from a plain detector of the demo, and
has no form from scratch. Originals stay in a folder, for the cells that start from them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rewired_recognition import judge

from evidence.cells import Cell, Figures, Options, mean_and_interval, table, verdict
from evidence.training import command_line, kept, kept_by, on_demo, trained
from re2tal.config import RecognitionConfig, RunConfig
from re2tal.recipes.recognition import demo_clips
from re2tal.training.schedule import ScheduleConfig

BACKBONES = ("slowfast_nano", "swin3d_nano", "videomae_nano")
STARTS = {"swin3d_nano": ("swin3d_nano", "actionformer")}
"""Backbones that start from a plain detector of the demo with the same seed, and that detector."""
SLOWER = {"videomae_nano": 2}
"""Backbones that are trained at a fraction of the recipe's rate, for as many times as long: VideoMAE learned nothing in
20 epochs at the recipe's."""
SHARES = (0.03, 0.1)
"""Of the original's epochs, for which the rewired network is trained on; at least one epoch."""
TUNING_RATE = 5e-4
"""Falls to 0."""
GENTLE = " gently"
GENTLE_RATE = 1e-4
"""Of forms whose names end so, of other backbones than SlowFast. Two epochs at the other rate took 2 points from Video
Swin's original."""
REWIRED: dict[str, dict[str, Any]] = {"rewired": {}, "in segments": {"merge": "extrapolate", "segment": 2}}
"""Ways to rewire, by the form's name."""


@dataclass(frozen=True)
class Size:
    """How much is trained on, and for how long."""

    clips: tuple[int, int]
    """Of the two subsets."""
    batch: int
    epochs: int

    @property
    def tuning(self) -> list[int]:
        """Epochs of each of SHARES; equal ones once."""
        return sorted({max(1, round(share * self.epochs)) for share in SHARES})


SIZES = {True: Size((240, 120), batch=16, epochs=10), False: Size((480, 240), batch=16, epochs=20)}


def size_for(options: Options, backbone: str) -> Size:
    """With the epochs that this backbone takes."""
    size = SIZES[options.quick]
    return replace(size, epochs=size.epochs * SLOWER.get(backbone, 1))


def built_clips(options: Options, size: Size) -> Path:
    """Shards of the demo's clips; they are built where they are missing."""
    folder = options.data / f"clips-{size.clips[0]}-{size.clips[1]}"
    if not (folder / "shards" / "validation" / "manifest.json").is_file():
        training, validation = map(str, size.clips)
        made = ["--num-training", training, "--num-validation", validation]
        command_line("demo", "--clips", "--out", str(folder), *made)
        kept = ["--clips", str(folder / "clips"), "--out", str(folder / "shards")]
        command_line("shards", "build", "--dataset", "demo", *kept)
    return folder / "shards"


def recognizer_run(shards: Path, size: Size, *, backbone: str, rewired: bool, seed: int) -> RecognitionConfig:
    """The recipe for the demo's clips, in one process; `size` is that of `backbone`, see `size_for`."""
    run, slower = demo_clips(), SLOWER.get(backbone, 1)
    rate = run.optimizer.learning_rate / slower
    return replace(
        run,
        optimizer=replace(run.optimizer, learning_rate=rate, backbone_learning_rate=rate),
        data=replace(run.data, shards=shards),
        backbone=replace(run.backbone, name=backbone, rewired=rewired),
        engine=replace(run.engine, batch_size=size.batch),
        training=replace(run.training, epochs=size.epochs, seed=seed, checkpoint_every_steps=100_000),
    )


@dataclass(frozen=True)
class Original:
    """A plain recognizer, its run folder, which stays, and what it starts from: a run and a folder that stays too."""

    run: RecognitionConfig
    folder: Path
    first: tuple[RunConfig, Path] | None

    def train(self) -> Figures:
        """Its summary."""
        run = self.run
        if self.first is not None:
            weights = str(kept(*self.first) / "model.safetensors")
            run = replace(run, backbone=replace(run.backbone, weights=weights))
        return trained(run, keep=self.folder)

    def kept(self) -> Path:
        """Its folder; it is trained where that is missing."""
        return kept_by(self.train, self.folder)

    def as_it_stands(self, **backbone: Any) -> Figures:
        """Its weights in the network of other settings of the backbone."""
        return judge(self.kept(), replace(self.run, backbone=replace(self.run.backbone, **backbone))).to_json()

    def trained_on(self, *, epochs: int, rate: float = TUNING_RATE, **backbone: Any) -> Figures:
        """The same after `epochs` more; without settings, of the original."""
        tuned = replace(
            self.run,
            start_from=self.kept(),
            backbone=replace(self.run.backbone, **backbone),
            optimizer=replace(self.run.optimizer, learning_rate=rate, backbone_learning_rate=rate),
            schedule=ScheduleConfig(warmup_epochs=0.0),
            training=replace(self.run.training, epochs=epochs, average_decay=None),
        )
        return trained(tuned)


def original(options: Options, size: Size, backbone: str, *, seed: int) -> Original:
    """The plain recognizer of a backbone, and where its run folder stays."""
    shards = built_clips(options, size)
    run = recognizer_run(shards, size, backbone=backbone, rewired=False, seed=seed)
    first = on_demo(options, "end to end, plain", STARTS[backbone], seed=seed) if backbone in STARTS else None
    return Original(run, shards.parent / f"original-{backbone}-{size.epochs}-{seed}", first)


def cells(options: Options) -> dict[str, Cell]:
    """Of every backbone and seed, and every form."""
    found = {}
    for seed in range(options.seeds):
        for backbone in BACKBONES:
            size = size_for(options, backbone)
            first = original(options, size, backbone, seed=seed)
            forms: dict[str, Cell] = {"original": first.train}
            for form, way in REWIRED.items():
                forms[form] = partial(first.as_it_stands, rewired=True, **way)
                for epochs in size.tuning:
                    forms[f"{form}, + {epochs} epochs"] = partial(first.trained_on, epochs=epochs, rewired=True, **way)
            longest = size.tuning[-1]
            forms[f"original, + {longest} epochs"] = partial(first.trained_on, epochs=longest)
            if backbone != BACKBONES[0]:
                gently = partial(first.trained_on, epochs=longest, rate=GENTLE_RATE)
                forms[f"original, + {longest} epochs{GENTLE}"] = gently
                for form, way in REWIRED.items():
                    forms[f"{form}, + {longest} epochs{GENTLE}"] = partial(gently, rewired=True, **way)
            if backbone not in STARTS:
                run = recognizer_run(built_clips(options, size), size, backbone=backbone, rewired=True, seed=seed)
                forms["from scratch"] = partial(trained, run)
            for form, cell in forms.items():
                found[f"recognizer / {form} / {backbone} / {size.epochs} epochs / seed {seed}"] = cell
    return found


def show(done: Mapping[str, Figures]) -> list[str]:
    """A table for each backbone and length, and whether the claim holds."""
    settings: dict[str, dict[str, dict[str, Figures]]] = {}
    for key, figures in done.items():
        _, form, backbone, epochs, seed = key.split(" / ")
        settings.setdefault(f"{backbone}, {epochs}", {}).setdefault(form, {})[seed] = figures
    lines = [
        "Recognizers on trimmed clips of the demo: four slides and two senses of a circle (six classes, chance 17 %).",
        "The original is plain, from random weights, with Video Swin from a plain detector of the demo; then the same",
        "weights rewired, as they stand and trained on. *In segments*: merged by extrapolation every 2 branches, which",
        "is the original's function (SlowFast's but for the place of its ReLUs) and keeps two states a segment. In a",
        "stage of this SlowFast one block of two is residual, so its runs are no longer without segments.",
    ]
    for setting, forms in settings.items():
        lines += ["", f"**{setting}**", "", *_table(forms), "", *_verdict(forms)]
    return lines


def _table(forms: Mapping[str, Mapping[str, Figures]]) -> Iterator[str]:
    rows = []
    for form in sorted(forms, key=_place):
        runs = list(forms[form].values())
        times = [run["train_seconds"] for run in runs if "train_seconds" in run]
        seconds = f"{statistics.fmean(times):.0f}" if times else ""
        rows.append((form, mean_and_interval([run["top1"] for run in runs]), seconds, str(len(runs))))
    return table(("network", "top-1, %", "training, s", "seeds"), rows)


def _place(form: str) -> tuple[int, int, bool]:
    """Where a form stands in the table: those of one start side by side, by how long they were trained on."""
    start, _, added = form.partition(", +")
    epochs = int(added.split()[0]) if added else 0
    return ("original", *REWIRED, "from scratch").index(start), epochs, form.endswith(GENTLE)


def _verdict(forms: Mapping[str, Mapping[str, Figures]]) -> Sequence[str]:
    """The claim: trained on for a tenth of the epochs, the rewired network is within a point of the original."""
    lines = []
    for way in REWIRED:
        tuned = [form for form in forms if form.startswith(f"{way}, +")]
        epochs = max((_place(form)[1] for form in tuned), default=0)
        for form in sorted((form for form in tuned if _place(form)[1] == epochs), key=_place):
            seeds = sorted(set(forms[form]) & set(forms.get("original", {})))
            away = [forms[form][seed]["top1"] - forms["original"][seed]["top1"] for seed in seeds]
            if away:
                lines.append(f"- {form.capitalize()}, less original: {verdict(away, aim=-1.0)}")
    return lines
