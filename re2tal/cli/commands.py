"""The commands: where each is, what it does and how it is used.

Imports nothing: `re2tal --help` must be quick.
"""

from __future__ import annotations

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("re2tal.cli.demo:demo", "write a small data set of real videos to try everything on"),
    "annotations": ("re2tal.cli.annotations:annotation_files", "convert files of annotation tools and data sets"),
    "recipes": ("re2tal.cli.recipes:recipes", "list settings to train with, and what is published of them"),
    "datasets": ("re2tal.cli.datasets:datasets", "list published data sets, and compare annotations with them"),
    "doctor": ("re2tal.cli.doctor:doctor", "check videos and annotations before a build, or this machine"),
    "init": ("re2tal.cli.init:init", "look at your videos and annotations, and write a configuration to train with"),
    "shards": ("re2tal.cli.shards:shards", "pack videos and annotations into training data"),
    "features": ("re2tal.cli.features:features", "store a backbone's features of each video, to train on them instead"),
    "train": ("re2tal.cli.train:train", "train and evaluate a detector, or a recognizer to fine-tune a backbone"),
    "reproduce": (
        "re2tal.cli.reproduce:reproduce",
        "train a published setting, and compare the score with the published one",
    ),
    "plan": ("re2tal.cli.plan:plan", "print the memory of a training step by part, before anything is launched"),
    "detect": ("re2tal.cli.detect:detect", "find actions in video files or shards with a trained detector"),
    "classify": ("re2tal.cli.classify:classify", "classify trimmed videos with a trained recognizer"),
    "evaluate": (
        "re2tal.cli.evaluate:evaluate",
        "score detections against annotations, or class scores against shards",
    ),
    "merge-results": (
        "re2tal.cli.merge_results:merge_results",
        "merge the detections of several runs, or name class-agnostic ones",
    ),
    "compare": ("re2tal.cli.compare:compare", "test whether two results differ in mAP by more than chance"),
    "rewire": (
        "re2tal.cli.rewire:rewire",
        "show which parts of a backbone become reversible, and the memory that saves",
    ),
    "import": ("re2tal.cli.import_weights:import_weights", "take over a detector or a backbone trained elsewhere"),
    "export": ("re2tal.cli.export:export", "write weights under the names of another code base"),
    "view": ("re2tal.cli.view:view", "look at detections beside their videos, and correct them into annotations"),
    "report": ("re2tal.cli.report:report", "draw a run's curves and detections on one page"),
}
"""Name -> where its function is, and what it does."""

STARTING_POINTS = {"train": "demo", "plan": "demo", "import": "thumos14_re2swin_tiny"}
"""Commands that take --recipe or --config and any change to it, and the recipe they begin with by default."""

EXAMPLES: dict[str, tuple[str, str]] = {
    "demo": ("re2tal demo --out demo_data", "re2tal demo --out clips --clips"),
    "annotations": (
        "re2tal annotations convert labels.csv --videos VIDEOS --out annotations.json",
        "re2tal annotations formats",
    ),
    "annotations convert": (
        "re2tal annotations convert labels.csv --videos VIDEOS --out annotations.json",
        "re2tal annotations convert elan/ --tiers action --out annotations.json",
    ),
    "annotations formats": ("re2tal annotations formats", "re2tal annotations formats | grep ELAN"),
    "recipes": ("re2tal recipes", "re2tal recipes thumos14_re2swin_tiny"),
    "datasets": ("re2tal datasets", "re2tal datasets thumos14 --check annotations.json"),
    "doctor": ("re2tal doctor VIDEOS annotations.json", "re2tal doctor"),
    "init": (
        "re2tal init VIDEOS annotations.json",
        "re2tal init VIDEOS annotations.json --weights swin_tiny.pth --out mine.json",
    ),
    "shards": (
        "re2tal shards build --videos VIDEOS --annotations annotations.json --out SHARDS",
        "re2tal shards list SHARDS/training",
    ),
    "shards build": (
        "re2tal shards build --videos VIDEOS --annotations annotations.json --out SHARDS",
        "re2tal shards build --videos VIDEOS --annotations annotations.json --out SHARDS --dataset thumos14",
    ),
    "shards annotate": (
        "re2tal shards annotate SHARDS annotations.json",
        "re2tal shards annotate SHARDS annotations.json --invalid-segments drop",
    ),
    "shards index": (
        "re2tal shards index TARS --annotations annotations.json --out SHARDS",
        "re2tal shards index TARS --subset validation --out SHARDS",
    ),
    "shards merge": (
        "re2tal shards merge SHARDS MORE_SHARDS --out BOTH",
        "re2tal shards merge SHARDS/training MORE_SHARDS/training --out BOTH",
    ),
    "shards verify": ("re2tal shards verify SHARDS/training", "re2tal shards verify SHARDS/training SHARDS/validation"),
    "shards list": ("re2tal shards list SHARDS/training", "re2tal shards list SHARDS/training SHARDS/validation"),
    "features": (
        "re2tal features extract --shards SHARDS/training --run runs/mine --out FEATURES",
        "re2tal features pack --features FOLDER --annotations annotations.json --out FEATURES",
    ),
    "features extract": (
        "re2tal features extract --shards SHARDS/training --run runs/mine --out FEATURES",
        "re2tal features extract --shards SHARDS/training --backbone.name videomae_base --out FEATURES",
    ),
    "features pack": (
        "re2tal features pack --features FOLDER --annotations annotations.json --out FEATURES",
        "re2tal features pack --features FOLDER --annotations annotations.json --out FEATURES --dataset thumos14",
    ),
    "train": (
        "re2tal train --config recipe.json --out runs/mine",
        "re2tal train --recipe thumos14_re2swin_tiny --data.shards SHARDS --backbone.weights swin_tiny.pth",
    ),
    "reproduce": (
        "re2tal reproduce thumos14 --annotations thumos14.json --shards SHARDS --weights slowfast.pth",
        "re2tal reproduce thumos14 --annotations thumos14.json --shards SHARDS --dry-run",
    ),
    "plan": (
        "re2tal plan --recipe thumos14_re2swin_tiny",
        "re2tal plan --recipe thumos14_re2swin_tiny --memory-budget-gb 12",
    ),
    "detect": (
        "re2tal detect party.mp4 --model runs/mine --out party.srt",
        "re2tal detect VIDEOS --recursive --model runs/mine --out found.json",
    ),
    "classify": (
        "re2tal classify --run runs/clips --videos VIDEOS",
        "re2tal classify --run runs/clips --shards SHARDS/validation --out scores.json",
    ),
    "evaluate": (
        "re2tal evaluate --predictions results.json --annotations annotations.json",
        "re2tal evaluate --predictions results.json --annotations annotations.json --errors --bootstrap 1000",
    ),
    "merge-results": (
        "re2tal merge-results rgb.json flow.json --out both.json",
        "re2tal merge-results agnostic.json --video-classes cuhk_val_simp_7.json --out named.json",
    ),
    "compare": (
        "re2tal compare runs/a/results.json runs/b/results.json",
        "re2tal compare a.json b.json --annotations annotations.json",
    ),
    "rewire": (
        "re2tal rewire videomae_base",
        "re2tal rewire swin3d_tiny --weights swin_tiny.pth --frames 96 --size 224 224",
    ),
    "import": (
        "re2tal import opentad.pth --recipe thumos14_re2swin_tiny --classes classes.txt --out runs/theirs",
        "re2tal import mmaction2.pth --backbone.name swin3d_tiny --out swin_tiny.safetensors",
    ),
    "export": (
        "re2tal export --run runs/mine --to re2tal --out my_model",
        "re2tal export --run runs/mine --to opentad --out theirs.safetensors",
    ),
    "view": (
        "re2tal view runs/mine --videos VIDEOS",
        "re2tal view results.json --videos VIDEOS --annotations annotations.json",
    ),
    "report": ("re2tal report --run runs/mine", "re2tal report --run runs/mine --predictions results.json"),
}
"""Page of help -> two uses."""
