"""The `re2tal` command: parse, build, call. One file per subcommand; a command is imported only when it is called."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import re2tal
from re2tal.runs.exit_status import DIVERGED, KEYBOARD, WRONG_INPUT
from re2tal.training.signals import stop_requests

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("re2tal.cli.demo:demo", "write a small data set of real videos to try everything on"),
    "annotations": (
        "re2tal.cli.annotations:annotation_files",
        "convert files of annotation tools and data sets",
    ),
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `re2tal` command; `arguments` without the program's name, from the command line by default.

    A fault in what the user gave (ValueError, OSError) ends in one line on stderr and exit status 2, never in a
    traceback.
    """
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return
    if name == "--version":
        print(f"re2tal {re2tal.__version__}")
        return
    if name not in COMMANDS:
        _exit(f"unknown command {name!r}; known: {', '.join(COMMANDS)}", WRONG_INPUT)
    try:
        # From the first line on: torch takes seconds to import, and a scheduler may not wait for it.
        with stop_requests() if name == "train" else nullcontext():
            status = _run(name, rest)
    except (ValueError, OSError) as error:
        _exit(str(error), WRONG_INPUT)
    except FloatingPointError as error:
        _exit(str(error), DIVERGED)
    except KeyboardInterrupt:
        _exit("stopped by the keyboard; finished files are kept, a training run goes on with --resume", KEYBOARD)
    sys.exit(status)


def _run(name: str, arguments: Sequence[str]) -> int:
    import tyro

    function = _load(COMMANDS[name][0])
    if name in STARTING_POINTS:
        from re2tal.cli.starting_point import starting_point

        run, arguments = starting_point(arguments, default=STARTING_POINTS[name])
        function = partial(function, run=run)
    status = tyro.cli(
        function,
        args=arguments,
        prog=f"re2tal {name}",
        config=(tyro.conf.AvoidSubcommands,),
        registry=short_floats(),
    )
    return 0 if status is None else status


def short_floats() -> ConstructorRegistry:
    """Lets --help show 0.39999999999999997, the published threshold to the last bit, as 0.4.

    The value stays what it is.
    """
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def short(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[float] | None:
        if info.type is not float:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="FLOAT",
            instance_from_str=lambda given: float(given[0]),
            is_instance=lambda value: isinstance(value, float | int),
            str_from_instance=lambda value: [f"{value:.6g}"],
        )

    return registry


def _load(place: str) -> Callable:
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(module), function)


def _usage() -> str:
    lines = [f"  {name:<12} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: re2tal COMMAND [options]      (re2tal COMMAND --help tells them)",
            "       re2tal --version",
            "",
            *lines,
        ]
    )


def _exit(message: str, status: int) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rank = f" (rank {os.environ.get('RANK')})" if ranks > 1 else ""
    print(f"re2tal{rank}: {message}", file=sys.stderr)
    sys.exit(status)
