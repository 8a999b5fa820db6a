"""Trainings that the parts compare: the demo recipe with one thing changed, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from evidence.cells import REPOSITORY, Figures, Options
from re2tal.backbones import BackboneConfig
from re2tal.config import RecognitionConfig, RunConfig, save_config
from re2tal.localizers.pyramid.actionformer import ActionFormerConfig
from re2tal.localizers.pyramid.tridet import TriDetConfig
from re2tal.recipes.presets import demo
from re2tal.strict_json import read_json

SETTINGS = (("swin3d_nano", "actionformer"), ("slowfast_nano", "tridet"))
ADAPTERS: dict[str, dict[str, Any]] = {
    "swin3d_nano": {"adapter": "lora", "lora_targets": ("qkv", "proj")},
    "videomae_nano": {"adapter": "temporal"},
}
"""SlowFast has none: LoRA updates linear layers, and it is made of convolutions."""
FORMS = ("frozen at random", "end to end, plain", "end to end, rewired", "adapters in a frozen backbone")
FROM_RECOGNITION = "frozen, from recognition"
"""The form whose backbone was trained to recognize clips of the demo, plain, and then frozen."""
FROM_DEMO = ", from the demo"
"""What a form's name ends in if a training on the demo came before: end to end, rewired or (STARTS_PLAIN) plain."""
IN_SEGMENTS = "end to end, rewired in segments"
"""Merged by extrapolation every 2 branches: the plain network's function, but for the place of SlowFast's ReLUs."""
STARTS_PLAIN = ("end to end, plain", IN_SEGMENTS)
FROM_PLAIN = "end to end, rewired, from the plain detector of the demo"
"""By the paper's merge, as `rewired`, but from where IN_SEGMENTS starts: what the merge makes of the difference."""
FROM_DEMO_FORMS = (*(form + FROM_DEMO for form in ("frozen", *STARTS_PLAIN, "end to end, rewired")), FROM_PLAIN)
QUICK_FORMS = ("end to end, rewired", "frozen at random", "end to end, plain")
DEMO_EPOCHS = {True: 12, False: 32}
LIMIT_SECONDS = 4 * 3600
_LOCKS: dict[Path, threading.RLock] = {}


def backbone_of(name: str, form: str) -> BackboneConfig:
    """One of FORMS, from the demo or not; of adapters, the frozen network is random too."""
    changes: dict[str, dict[str, Any]] = {
        "frozen at random": {"frozen": True},
        "frozen": {"frozen": True},
        FROM_RECOGNITION: {"frozen": True, "rewired": False},
        "end to end, plain": {"rewired": False},
        "end to end, rewired": {},
        IN_SEGMENTS: {"merge": "extrapolate", "segment": 2},
        FROM_PLAIN: {},
        "adapters in a frozen backbone": ADAPTERS.get(name, {}),
    }
    return BackboneConfig(name=name, **changes[form.removesuffix(FROM_DEMO)])


def small_localizer(name: str) -> ActionFormerConfig | TriDetConfig:
    """The demo's ActionFormer, or a TriDet of its size."""
    small = demo().localizer
    assert isinstance(small, ActionFormerConfig)
    if name == "actionformer":
        return small
    return TriDetConfig(
        channels=small.channels,
        num_embedding_convs=1,
        num_stem_blocks=1,
        mlp_channels=2 * small.channels,
        max_num_steps=small.max_num_steps,
        regression_ranges=small.regression_ranges,
        initial_positives=small.initial_positives,
        step_supervision=small.step_supervision,
        # At 0 the blocks stay MLPs, which pretrained features forgive and random ones do not.
        initial_std=0.02,
    )


def trained(run: RunConfig | RecognitionConfig, *, keep: Path | None = None) -> Figures:
    """Trains and evaluates `run` in one process; the run folder goes, or is `keep`. Gives its summary.

    Cells that run side by side wait for each other where they keep the same folder.
    """
    with tempfile.TemporaryDirectory() as temporary, _alone_in(keep) if keep else nullcontext():
        folder = keep or Path(temporary) / "run"
        config = Path(temporary) / "config.json"
        save_config(config, run)
        command_line("train", "--config", str(config), "--out", str(folder), "--overwrite")
        return read_json(folder / "summary.json")


def kept(run: RunConfig | RecognitionConfig, folder: Path) -> Path:
    """The run folder of `run`; it is trained where that is missing, once for all cells that start from it."""
    return kept_by(partial(trained, run, keep=folder), folder)


def kept_by(train: Callable[[], Figures], folder: Path) -> Path:
    """The same of what `train` trains into `folder`."""
    with _alone_in(folder):
        if not (folder / "summary.json").is_file():
            train()
    return folder


def _alone_in(folder: Path) -> threading.RLock:
    return _LOCKS.setdefault(folder.resolve(), threading.RLock())


def command_line(*arguments: str) -> None:
    """The command line, of this repository; RuntimeError with the end of what it said if it fails."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "re2tal", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"re2tal {arguments[0]} ended with {done.returncode}: {done.stderr[-1500:]}")


def demo_run(shards: Path, *, epochs: int, seed: int, **changes: Any) -> RunConfig:
    """The demo recipe in one process, with as many clips a step as its two ranks take together."""
    run = demo()
    return replace(
        run,
        data=replace(run.data, shards=shards),
        engine=replace(run.engine, batch_size=8),
        training=replace(run.training, epochs=epochs, seed=seed, checkpoint_every_steps=100_000),
        **changes,
    )


def detector_run(shards: Path, form: str, setting: tuple[str, str], *, epochs: int, seed: int) -> RunConfig:
    """The demo recipe with one of FORMS, and the backbone and localizer of a setting."""
    backbone, localizer = setting
    return demo_run(
        shards, epochs=epochs, seed=seed, backbone=backbone_of(backbone, form), localizer=small_localizer(localizer)
    )


def cell_key(form: str, setting: tuple[str, str], *, epochs: int, seed: int) -> str:
    """Form, backbone, localizer, epochs, seed."""
    return f"{form} / {' / '.join(setting)} / {epochs} epochs / seed {seed}"


def on_demo(options: Options, form: str, setting: tuple[str, str], *, seed: int) -> tuple[RunConfig, Path]:
    """A training on the demo, and where its run folder stays for those that start from it."""
    run = detector_run(built(options, "demo"), form, setting, epochs=DEMO_EPOCHS[options.quick], seed=seed)
    name = "-".join((*form.replace(",", "").split(), *setting, str(run.training.epochs), str(seed)))
    return run, options.data / "detectors" / name


def started(run: RunConfig, first: RunConfig, folder: Path) -> Figures:
    """`run`, from the detector that `first` trained, which stays in `folder`; the classes are new."""
    return trained(replace(run, start_from=kept(first, folder)))


def forms_of(setting: tuple[str, str]) -> Sequence[str]:
    """FORMS, without adapters where the backbone has none."""
    return FORMS if setting[0] in ADAPTERS else FORMS[:-1]


def settings(options: Options) -> Sequence[tuple[str, str]]:
    """Backbones and their localizers; with `quick`, the demo's own."""
    return SETTINGS[:1] if options.quick else SETTINGS


def built(options: Options, name: str) -> Path:
    """Shards of "demo" or "urfd"; they are built where they are missing."""
    folder = options.data / name
    shards = folder / "shards"
    if (shards / "validation" / "manifest.json").is_file():
        return shards
    source, extra = folder, ["--dataset", "demo"]
    if name == "urfd":
        source, extra = options.shared / "urfd", ["--dataset", "urfd", "--fps", "16", "--short-side", "96"]
        if not (source / "annotations.json").is_file():
            raise ValueError(
                f"{source} has no annotations.json; fetch the data set (`re2tal datasets urfd` says where) and give "
                "its parent folder as --shared"
            )
    steps = [["demo", "--out", str(folder)]] if name == "demo" else []
    named = ["--videos", str(source / "videos"), "--annotations", str(source / "annotations.json")]
    steps.append(["shards", "build", *extra, *named, "--out", str(shards)])
    for step in steps:
        command_line(*step)
    return shards
