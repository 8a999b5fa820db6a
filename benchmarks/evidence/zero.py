"""Part `zero`: bytes of one rank against the number of ranks, counted and modelled, and what communication costs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from evidence.cells import REPOSITORY, Cell, Figures, Options, table
from evidence.pictures import lines as draw_lines
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


def _start(preset: str, ranks: int, steps: int, path: Path) -> tuple[subprocess.Popen[str], Path]:
    rank = str(REPOSITORY / "benchmarks" / "evidence" / "zero_rank.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), rank]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    started = subprocess.Popen(
        [*command, preset, str(steps), str(path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return started, path


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
    """To 4 ranks; with `quick` to 2, ZeRO-2 only."""
    presets, counts = (("zero2",), (1, 2)) if options.quick else (PRESETS, (1, 2, 4))
    steps = STEPS[options.quick]
    return {
        f"{preset} / {ranks} / {steps} steps": partial(ranks_together, preset, ranks, steps=steps)
        for preset in presets
        for ranks in counts
    }


def show(done: Mapping[str, Figures], pictures: Path) -> list[str]:
    """Counted beside modelled, and the share of time that is lost."""
    rows, curves = [], {}
    for key, figures in done.items():
        preset, ranks, _ = key.split(" / ")
        lost = 1 - figures["seconds apart"] / figures["seconds"]
        sizes = (
            f"{figures[name] / 2**20:.2f}"
            for phase in ("between steps", "optimizer's step")
            for name in (phase, f"{phase}, modelled")
        )
        rows.append((f"{preset}, {ranks} ranks", *sizes, f"{100 * lost:.0f} %" if int(ranks) > 1 else ""))
        for name in ("between steps", "between steps, modelled"):
            curves.setdefault(f"{preset}, {name}", {})[float(ranks)] = figures[name] / 2**20
    draw_lines(pictures / "zero.svg", curves, x="ranks", y="MiB of a rank between steps")
    head = ("", "between steps, MiB", "modelled", "optimizer's step, MiB", "modelled", "lost to communication")
    return [
        "The demo's detector in float32 on a CPU; every storage of a rank counted, activations and the batch left out.",
        "The model (`re2tal plan`) gives the same for any number of ranks. Lost: against as many processes that each",
        "train alone at the same time, on the same cores. What loading costs was not measured.",
        "",
        *table(head, rows),
        "",
        f"![Memory of a rank by ranks]({pictures.name}/zero.svg)",
    ]
