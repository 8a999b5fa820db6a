"""Part `zero`: bytes of one rank by ranks, counted and modelled, and what communication and loading cost."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from evidence.cells import REPOSITORY, Cell, Figures, Options, table
from evidence.pictures import lines as draw_lines
from evidence.training import built, demo_run
from re2tal.config import RunConfig, save_config
from re2tal.strict_json import read_json

PRESETS = ("zero1", "zero2", "zero3")
STEPS = {True: 3, False: 12}
LIMIT_SECONDS = 900


def ranks_together(preset: str, ranks: int, *, steps: int) -> Figures:
    """`ranks` processes in one run, and as many that each train alone at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        together = _figures([_start(preset, ranks, steps, Path(folder) / "together.json")])[0]
        if ranks == 1:
            return together | {"seconds apart": together["seconds"]}
        paths = [Path(folder) / f"alone-{number}.json" for number in range(ranks)]
        apart = _figures([_start(preset, 1, steps, path) for path in paths])
    return together | {"seconds apart": sum(one["seconds"] for one in apart) / ranks}


def waited_for_videos(run: RunConfig, ranks: int) -> Figures:
    """`run` on `ranks`: the mean share of a step that a rank waits for its loader, once loaders are warm."""
    with tempfile.TemporaryDirectory() as folder:
        config, out = Path(folder) / "config.json", Path(folder) / "run"
        save_config(config, run)
        command = ["-m", "re2tal", "train", "--config", str(config), "--out", str(out)]
        _figures([(_launch(ranks, command), config)])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # The first line holds the start of the worker processes.
    warm = [line for line in lines if line["kind"] == "train"][1:]
    return {name: statistics.fmean(line[name] for line in warm) for name in ("loader_wait", "clips_per_second")}


def _start(preset: str, ranks: int, steps: int, path: Path) -> tuple[subprocess.Popen[str], Path]:
    rank = str(REPOSITORY / "benchmarks" / "evidence" / "zero_rank.py")
    return _launch(ranks, [rank, preset, str(steps), str(path)]), path


def _launch(ranks: int, command: list[str]) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    return subprocess.Popen(
        [*launcher, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _figures(started: list[tuple[subprocess.Popen[str], Path]]) -> list[Figures]:
    outputs = []
    for process, _ in started:
        try:
            outputs.append(process.communicate(timeout=LIMIT_SECONDS)[0])
        finally:
            process.kill()
    for (process, _), output in zip(started, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"a rank ended with {process.returncode}: {output[-1500:]}")
    return [read_json(path) for _, path in started]


def cells(options: Options) -> dict[str, Cell]:
    """To 4 ranks; with `quick` to 2, ZeRO-2 only. Loading on as many ranks as two cores have, and on one."""
    presets, counts = (("zero2",), (1, 2)) if options.quick else (PRESETS, (1, 2, 4))
    steps, shards = STEPS[options.quick], built(options, "demo")
    found: dict[str, Cell] = {
        f"{preset} / {ranks} / {steps} steps": partial(ranks_together, preset, ranks, steps=steps)
        for preset in presets
        for ranks in counts
    }
    for ranks in (1, 2):
        run = demo_run(shards, epochs=1 if options.quick else 3, seed=0)
        # The recipe's warmup is longer than these few epochs.
        schedule = replace(run.schedule, warmup_epochs=0.0)
        run = replace(run, schedule=schedule, engine=replace(run.engine, batch_size=run.engine.batch_size // ranks))
        found[f"loading / {ranks} / {run.training.epochs} epochs"] = partial(waited_for_videos, run, ranks)
    return found


def show(done: Mapping[str, Figures], pictures: Path) -> list[str]:
    """Counted beside modelled, and the share of time that is lost."""
    rows, curves, loading = [], {}, []
    for key, figures in done.items():
        preset, ranks, _ = key.split(" / ")
        if preset == "loading":
            loading.append(
                (_named(ranks), f"{100 * figures['loader_wait']:.1f} %", f"{figures['clips_per_second']:.1f}")
            )
            continue
        lost = 1 - figures["seconds apart"] / figures["seconds"]
        sizes = (
            f"{figures[name] / 2**20:.2f}"
            for phase in ("between steps", "optimizer's step")
            for name in (phase, f"{phase}, modelled")
        )
        rows.append((f"{preset}, {_named(ranks)}", *sizes, f"{100 * lost:.0f} %" if int(ranks) > 1 else ""))
        # Between steps, ZeRO 1 is ZeRO 2.
        if preset != "zero1":
            for name in ("between steps", "between steps, modelled"):
                curves.setdefault(f"{preset}, {name}", {})[float(ranks)] = figures[name] / 2**20
    draw_lines(pictures / "zero.svg", curves, x="ranks", y="MiB of a rank between steps")
    head = ("", "between steps, MiB", "modelled", "optimizer's step, MiB", "modelled", "lost to communication")
    return [
        "The demo's detector in float32 on a CPU; every storage of a rank counted, activations and the batch left out.",
        "The model (`re2tal plan`) gives the same for any number of ranks. Lost: against as many processes that each",
        "train alone at the same time, on the same cores: negative is noise, and four ranks share two cores. ZeRO-3's",
        "buffers have a fixed size, which is most of what so small a model needs.",
        "",
        *table(head, rows),
        "",
        *_loading(loading),
        f"![Memory of a rank by ranks]({pictures.name}/zero.svg)",
    ]


def _named(ranks: str) -> str:
    return "1 rank" if ranks == "1" else f"{ranks} ranks"


def _loading(rows: list[tuple[str, str, str]]) -> list[str]:
    if not rows:
        return ["What loading costs: not run.", ""]
    return [
        "Loading: the demo's training from its shards, decoding and all, its workers on the same cores.",
        "",
        *table(("8 clips a step on", "of a step waited for the loader", "clips a second"), rows),
        "",
    ]
