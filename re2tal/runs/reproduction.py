"""A published result, once more: data, weights and machine are checked, then it is trained, scored and compared.

annotations, shards, weights, machine -> problems      recipe -> memory and hours -> train -> score -> card
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from re2tal.backbones import BackboneConfig
from re2tal.config import RunConfig, load_config
from re2tal.data.contract.shards import open_shards, subset_folder
from re2tal.data.streaming.windows import ResizeWhole, Slide
from re2tal.distributed import World, resolve_world
from re2tal.localizers.pyramid.actionformer import ActionFormerConfig
from re2tal.planning.choice import plan_step
from re2tal.recipes import find_recipe
from re2tal.runs.datasets import compare_with_facts
from re2tal.runs.deepspeed_presets import DEFAULT_PRESET, find_preset
from re2tal.runs.detection import DetectionOptions, detect
from re2tal.runs.devices import default_device
from re2tal.runs.evaluation import Evaluated, ScoringOptions, evaluate
from re2tal.runs.exit_status import INTERRUPTED, SOME_LEFT_OUT
from re2tal.runs.folder import CONFIG_NAME, RESULTS_NAME
from re2tal.runs.lock import refuse_in_use
from re2tal.runs.published import PUBLISHED, BackboneFamily, Published, Target
from re2tal.runs.reproduction_card import DRAWS, Card
from re2tal.runs.reproduction_checks import (
    Checked,
    blocked_videos,
    check_data,
    check_machine,
    check_video_classes,
    check_weights,
    estimate_hours,
)
from re2tal.runs.training_run import train
from re2tal.strict_json import read_json, write_json

BLOCKED_NAME, NAMED_RESULTS_NAME = "blocked.json", "named_results.json"


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What to reproduce, from which files."""

    dataset: Target
    """thumos14 or activitynet"""
    annotations: Path
    """the annotation JSON that the shards were built from"""
    shards: Path
    """what `re2tal shards build --dataset DATASET` wrote: folders training and validation"""
    weights: Path | None = None
    """the pretrained backbone; its checksum is printed, and compared with the digits in its name"""
    backbone: BackboneFamily = "slowfast"
    """slowfast is SlowFast-101, with the paper's best scores; swin is Video Swin-T"""
    video_classes: Path | None = None
    """for activitynet, JSON of a classifier of whole videos, {"results": {ID: [K scores]}, "class": [K names]}, which
    names what is found"""
    blocked: Path | None = None
    """video ids to leave out, beside those that the catalog names: a JSON list, or one per line"""
    ds: str = DEFAULT_PRESET
    """ZeRO stage: a preset, such as zero2, or the path of a DeepSpeed file"""
    out: Path | None = None
    """run folder; runs/reproduce_DATASET_BACKBONE by default"""
    dry_run: bool = False
    """check all, print memory and hours, and train nothing"""
    tiny: bool = False
    """rehearse with a nano network for one epoch, on any machine"""
    resume: bool = False
    """continue from the newest checkpoint in the run folder"""
    overwrite: bool = False
    """remove what an earlier run left in the run folder"""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.out or Path("runs") / f"reproduce_{self.dataset}_{self.backbone}{'_tiny' if self.tiny else ''}"


def reproduce(asked: Reproduction) -> int:
    """Every rank calls this. Prints what is found, and writes card.md and card.json; gives the exit status."""
    world = resolve_world(os.environ)
    published = PUBLISHED[asked.dataset, asked.backbone]
    card = Card(asked.dataset, asked.tiny, published)
    config = _configured(asked, published, world)
    machine = check_machine(world)
    if asked.dry_run and (asked.folder / RESULTS_NAME).exists():
        raise ValueError(f"{asked.folder} holds a run, whose card a dry run would replace; give another --out")
    if asked.resume:
        _refuse_another_course(asked.folder, config)
    if not asked.dry_run:
        _refuse_what_cannot_be_compared(asked, published, machine)
    # Everything is looked at before the first step, and all that is wrong is told at once.
    card.add("machine", machine)
    card.add("data", check_data(asked.dataset, asked.annotations, asked.shards, asked.blocked))
    classes = open_shards(subset_folder(asked.shards, config.data.training_subset)).classes
    card.add("weights", Checked({"file": None}) if asked.tiny else check_weights(asked.weights, config, classes))
    if published.needs_video_classes:
        card.add("video classes", check_video_classes(asked.video_classes, asked.shards))
    # Every rank plans: the count needs no other rank.
    plan = _planned(config, asked, world, num_classes=len(classes))
    card.add("plan", Checked({"recipe": published.recipe, **plan}))
    if world.is_main:
        print(card, flush=True)
    status = 0
    if not asked.dry_run:
        status = _train_and_compare(asked, config, card, world)
    # An interrupted run has no card yet: it is resumed.
    if world.is_main and status != INTERRUPTED:
        card.write(asked.folder)
        print(f"{asked.folder / 'card.md'} and card.json say all of this")
    return status or (SOME_LEFT_OUT if card.problems else 0)


def _refuse_what_cannot_be_compared(asked: Reproduction, published: Published, machine: Checked) -> None:
    """ValueError where training would be in vain; a tiny rehearsal needs no accelerator, weights or classes."""
    if asked.tiny:
        return
    if machine.facts["device"] == "cpu":
        raise ValueError(
            f"this machine has no accelerator, and {published.recipe} would train for months on a CPU; give --dry-run "
            "to check all but the training, or --tiny to rehearse it with a small network"
        )
    if asked.weights is None:
        raise ValueError(
            "--weights is missing: the published network started from pretrained weights; give their file, or "
            "--dry-run to check the rest"
        )
    if published.needs_video_classes and asked.video_classes is None:
        raise ValueError(
            "--video-classes is missing: the published score names actions by a classifier of whole videos; give its "
            "JSON, or --dry-run to check the rest"
        )


def _refuse_another_course(folder: Path, config: RunConfig) -> None:
    """ValueError if the run to resume was made longer or shorter, or its learning rate went another way.

    A run may be resumed like that, which is said on the way, but is then not the published one. What else differs is
    refused with the checkpoint.
    """
    if not (folder / CONFIG_NAME).is_file():
        return
    earlier = load_config(folder / CONFIG_NAME)
    if (earlier.training.epochs, earlier.schedule) != (config.training.epochs, config.schedule):
        raise ValueError(
            f"{folder} holds a run of {earlier.training.epochs} epochs with {earlier.schedule}, and the published one "
            f"has {config.training.epochs} with {config.schedule}; give another --out, or --overwrite"
        )


def _configured(asked: Reproduction, published: Published, world: World) -> RunConfig:
    """The recipe with these files, and as many clips a step on these ranks as were published."""
    run = find_recipe(published.recipe)
    assert isinstance(run, RunConfig)
    run = replace(run, name=asked.folder.name, data=replace(run.data, shards=asked.shards))
    if asked.tiny:
        return tiny(run)
    run = replace(run, backbone=replace(run.backbone, weights=str(asked.weights) if asked.weights else None))
    batch = run.engine.batch_size
    # Learning rates were made for that many clips a step.
    accumulation, rest = divmod(published.clips_per_step, batch * world.world_size)
    if rest or not accumulation:
        fitting = [n for n in range(1, published.clips_per_step + 1) if published.clips_per_step % (n * batch) == 0]
        raise ValueError(
            f"{published.recipe} takes {published.clips_per_step} clips a step in batches of {batch}, which "
            f"{world.world_size} ranks cannot share evenly; start {' or '.join(map(str, fitting))} ranks"
        )
    return replace(run, engine=replace(run.engine, gradient_accumulation=accumulation))


def tiny(run: RunConfig) -> RunConfig:
    """The same course with a nano network from random weights, for one epoch: a rehearsal that any machine can do."""
    windowing, clips, num_steps = run.data.clips.windowing, run.data.clips, 32
    assert isinstance(windowing, Slide | ResizeWhole)
    assert isinstance(run.localizer, ActionFormerConfig)
    clips = replace(clips, windowing=replace(windowing, num_frames=num_steps), size=32, workers=1)
    return replace(
        run,
        num_steps=num_steps,
        data=replace(run.data, clips=clips),
        backbone=BackboneConfig(name="swin3d_nano"),
        localizer=replace(run.localizer, channels=16, max_num_steps=num_steps),
        engine=replace(run.engine, batch_size=1, precision="fp32"),
        schedule=replace(run.schedule, warmup_epochs=0.0),
        training=replace(run.training, epochs=1, evaluate_every_epochs=None, keep_best=False, log_every_steps=1),
    )


def _planned(config: RunConfig, asked: Reproduction, world: World, *, num_classes: int) -> dict[str, Any]:
    device = default_device()
    ds = find_preset(asked.ds)
    plan = plan_step(config, ds, world_size=world.world_size, num_classes=num_classes, device=device)
    return {
        "step": plan.headline,
        "peak bytes of a rank": plan.memory.peak,
        "clips a step": config.engine.batch_size * config.engine.gradient_accumulation * world.world_size,
        "epochs": config.training.epochs,
        "time": estimate_hours(config, asked.shards, world, on_cpu=asked.tiny),
    }


def _train_and_compare(asked: Reproduction, config: RunConfig, card: Card, world: World) -> int:
    """Gives the exit status. Every rank calls this."""
    published = card.published
    blocked = _write_blocked(asked, world)
    # Or the figures of the log, and the choice of a best model, would be of other videos than the card's.
    config = replace(config, evaluation=replace(config.evaluation, blocked_videos=blocked))
    trained = train(config, ds=asked.ds, out=asked.folder, resume=asked.resume, overwrite=asked.overwrite)
    if trained.interrupted:
        return INTERRUPTED
    results = asked.folder / RESULTS_NAME
    if published.needs_video_classes and asked.video_classes is not None:
        results = asked.folder / NAMED_RESULTS_NAME
        named = DetectionOptions(out=results, video_classes=asked.video_classes)
        detect(asked.folder, shards=subset_folder(asked.shards, config.data.validation_subset), wanted=named)
    if world.is_main:
        card.compare(_scored(asked, published, results, blocked), trained.summary)
        print(card.verdicts(), flush=True)
    return 0


def _write_blocked(asked: Reproduction, world: World) -> Path:
    """The file of videos that are not scored; ValueError where that would change the one of an earlier run."""
    path = asked.folder / BLOCKED_NAME
    blocked = sorted(blocked_videos(asked.dataset, asked.blocked))
    is_same = path.exists() and read_json(path) == blocked
    # Not with --resume either: the log, and the choice of a best model, would be of two lists.
    if path.exists() and not (is_same or asked.overwrite):
        raise ValueError(
            f"{path} is of an earlier run, and lists other videos; give the list of that run, another --out, or "
            "--overwrite to begin anew"
        )
    # A file, so that `re2tal evaluate --blocked-videos` gives the same score again. The others read it after `train`
    # has brought all ranks together.
    if world.is_main and not is_same:
        # `train` asks too, but a run that is at work here would evaluate other videos by then.
        refuse_in_use(asked.folder)
        write_json(path, blocked)
    return path


def _scored(asked: Reproduction, published: Published, results: Path, blocked: Path) -> Evaluated:
    renamed = compare_with_facts(asked.dataset, asked.annotations).renamed
    # The file may call it otherwise than recipes: THUMOS-14's "test" is what others call validation.
    subset = next((old for old, new in renamed.items() if new == "validation"), "validation")
    options = ScoringOptions(
        subset=subset,
        protocol="opentad",
        dataset=asked.dataset,
        blocked_videos=blocked,
        class_agnostic=published.needs_video_classes and asked.video_classes is None,
        bootstrap=DRAWS,
    )
    return evaluate(results, asked.annotations, options)
