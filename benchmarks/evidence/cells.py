"""A part of the evidence is a table of cells: single measurements, kept in the part's JSON file once they are done.

{"cells": {KEY: {"figures": {...}, "date": ..., "seconds": ..., "machine": ..., "command": ..., "revision": ...}}}
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from re2tal.strict_json import read_json, write_json

REPOSITORY = Path(__file__).resolve().parents[2]
# Of Student's distribution, two-sided 95 %, by degrees of freedom; above, the last one, which is a little too wide.
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}

Figures = dict[str, Any]
Cell = Callable[[], Figures]


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    seeds: int
    quick: bool
    data: Path
    """Folder of demo and URFD shards; those that are missing are built there."""
    shared: Path
    """Folder with `urfd`, `gmdcsa24` and `weights`, as data sets and weights were fetched."""
    jobs: int = 1
    """How many cells are measured side by side, in parts that have no figures of time or memory to disturb."""


@dataclass(frozen=True)
class Part:
    """A group of claims that is measured and shown together."""

    title: str
    cells: Callable[[Options], Mapping[str, Cell]]
    """Key -> measurement, in the order in which they run."""
    show: Callable[[Mapping[str, Figures], Path], Sequence[str]]
    """Figures of the cells that are done, and the folder for pictures -> lines of Markdown."""
    alone: bool = False
    """Whether its cells measure time or memory in a way that a neighbour would disturb."""


def run_part(name: str, part: Part, options: Options, folder: Path) -> list[str]:
    """Measures the cells that are not done yet; gives a line for each that failed."""
    path, failed = folder / f"{name}.json", []
    done = read_part(path)

    def timed(key: str, measure: Cell) -> tuple[Figures, float]:
        print(f"{name}: {key} ...", flush=True)
        start = time.perf_counter()
        return measure(), time.perf_counter() - start

    try:
        cells = part.cells(options)
    except Exception as error:  # as of a cell: other parts are measured
        traceback.print_exception(error)
        return [f"{name}: {type(error).__name__}: {error}"]
    with ThreadPoolExecutor(1 if part.alone else options.jobs) as pool:
        running = {}
        for key, measure in cells.items():
            if key in done:
                print(f"{name}: {key}: done before", flush=True)
            else:
                running[pool.submit(timed, key, measure)] = key
        for future in as_completed(running):
            key = running[future]
            try:
                figures, seconds = future.result()
            except Exception as error:  # one cell never ends the others; it is named, and the exit status says so
                traceback.print_exception(error)
                failed.append(f"{name}: {key}: {type(error).__name__}: {str(error)[-300:]}")
                continue
            done[key] = {"figures": figures, **circumstances(name, options, seconds)}
            write_json(path, {"cells": done})
    return failed


def read_part(path: Path) -> dict[str, Any]:
    """Key -> cell, of a part's file; empty where there is none."""
    return dict(read_json(path)["cells"]) if path.is_file() else {}


def circumstances(name: str, options: Options, seconds: float) -> Figures:
    """When, where and by which command something was measured."""
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(seconds, 1),
        "machine": machine(),
        "command": f"python benchmarks/claims.py --part {name} --seeds {options.seeds}{' --quick' * options.quick}",
        "revision": revision.stdout.strip() or "unknown",
    }


def machine() -> str:
    """Processor or devices, and versions."""
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        device = f"{len(os.sched_getaffinity(0))} cores of {platform.machine()}, no GPU"
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    threads = f"{torch.get_num_threads()} threads"
    return f"{device}, {threads}{load}, Python {platform.python_version()}, torch {torch.__version__}"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of two values or more and half the width of its 95 % interval by Student's distribution, in percent."""
    half = STUDENT.get(len(values) - 1, STUDENT[9]) * statistics.stdev(values) / len(values) ** 0.5
    return 100 * statistics.fmean(values), 100 * half


def mean_and_interval(values: Sequence[float]) -> str:
    """In percent; with the interval where there are two values or more."""
    if len(values) < 2:
        return f"{100 * values[0]:.1f}"
    mean, half = interval(values)
    return f"{mean:.1f} ± {half:.1f}"


def verdict(away: Sequence[float], *, aim: float) -> str:
    """Differences of pairs, as shares, against an aim in points: settled only where the interval leaves the aim out."""
    said = f"points (aim: at least {aim:+.0f})"
    if len(away) < 2:
        return f"{100 * away[0]:+.1f} {said}. One seed, so no interval and no verdict."
    mean, half = interval(away)
    found = "reached" if mean - half >= aim else "**not reached**" if mean + half < aim else "**not settled**"
    return f"{mean:+.1f} ± {half:.1f} {said}, paired by seed: {found}."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table; the first column is text, the others are numbers."""
    yield "| " + " | ".join(head) + " |"
    yield "| --- |" + " ---: |" * (len(head) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
