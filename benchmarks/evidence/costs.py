"""Parts `memory`, `resolution` and `precision`: what rewiring saves, what that buys, and what it costs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from evidence.cells import REPOSITORY, Cell, Figures, Options, mean_and_interval, table, verdict
from evidence.pictures import lines as draw_lines
from evidence.training import DEMO_EPOCHS, built, cell_key, demo_run, detector_run, trained
from re2tal.config import RunConfig
from re2tal.recipes import find_recipe

MODELS = ("swin3d_tiny", "videomae_base", "videomae_large", "slowfast_r101_8x8")
RECIPE = "thumos14_re2swin_tiny"
BUDGET_GIB = 12.0
SIZES = {"frames": (256, 512, 1024, 2048, 4096, 8192, 16384), "pixels": (96, 128, 160, 224, 288, 384, 448, 512)}
RESOLUTION_SETTING = ("slowfast_nano", "tridet")
EQUAL_MEMORY = ((24, 44), (32, 56))
"""Pixels a side, plain and rewired, of which a step on the demo needs as much memory: rewired 0.98 and 0.96 x."""
EQUAL = 1.05
"""Peaks that differ by a twentieth are called equal."""
FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16 on a grid": {"precision": "bf16"},
    "bf16 without a grid": {"precision": "bf16", "grid": None},
}


def script(name: str, *arguments: str) -> Figures:
    """What a benchmark of this folder writes with --json."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "figures.json"
        command = [sys.executable, str(REPOSITORY / "benchmarks" / f"{name}.py"), *arguments, "--json", str(found)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}.py ended with {done.returncode}: {done.stderr[-1500:]}")
        return {**json.loads(found.read_text()), "printed": done.stdout}


def memory_cells(options: Options) -> dict[str, Cell]:
    """Peaks and times of each network; the peaks of the recipe for whole THUMOS windows.

    Peaks are predicted, which is exact on a CPU; times are of small videos, since those of large ones take hours.
    """
    found: dict[str, Cell] = {f"recipe {RECIPE}": partial(script, "recipes", "--recipe", RECIPE)}
    for model in MODELS[:1] if options.quick else MODELS:
        found[f"network {model}"] = partial(script, "memory", "--model", model, "--quick")
    return found


def show_memory(done: Mapping[str, Figures], _: Path) -> list[str]:
    """The table of the recipe, and what the benchmark of each network printed."""
    lines: list[str] = []
    for key, figures in done.items():
        kind, name, *_ = key.split()
        if kind == "recipe":
            row = figures[name]
            head = ("recipe, peak of a step, GiB", *row)
            lines += [*table(head, [(name, *(f"{value:.3f}" for value in row.values()))]), ""]
        else:
            # The last lines repeat the JSON file, in one line a network.
            printed = [line for line in figures["printed"].strip().splitlines() if ": vs_plain " not in line]
            lines += [f"`{key.removeprefix('network ')}`", "", "```", *printed, "```", ""]
    return [
        *lines,
        "Peaks are predicted, to the byte of what is then measured on a CPU; times and drift are of the smaller videos",
        'named beside them, on which fixed costs weigh more: [results.md](results.md) has those of large ones. "Whole"',
        'is the paper\'s one branch at a time; "in pieces" and "as it stands" cut branches too. OpenTAD\'s',
        "memory and time beside: an outside run at the same Re2Swin-T weights, with a stand-in for its attention, gave",
        "ours 0.65 x its time and 0.25 x its memory whole, 0.16 x in pieces; it is not repeated by this command.",
    ]


def _peak_gib(run: RunConfig, *, frames: int, pixels: int, rewired: bool) -> float:
    from recipes import WHOLE, peak_gib

    clips = run.data.clips
    ratio = clips.windowing.num_frames // run.num_steps
    localizer = run.localizer
    if hasattr(localizer, "max_num_steps"):
        localizer = replace(localizer, max_num_steps=frames // ratio)
    run = replace(
        run,
        num_steps=frames // ratio,
        localizer=localizer,
        data=replace(
            run.data, clips=replace(clips, size=pixels, windowing=replace(clips.windowing, num_frames=frames))
        ),
    )
    changes: dict[str, Any] = {} if rewired else {"rewired": False, **WHOLE}
    return peak_gib(run, **changes)


def largest(recipe: str, *, rewired: bool, along: str) -> Figures:
    """Peaks by frames at the recipe's pixels, or by pixels at its frames, up to the first beyond the budget."""
    run, budget = find_recipe(recipe), BUDGET_GIB
    assert isinstance(run, RunConfig)
    clips = run.data.clips
    size, peaks = {"frames": clips.windowing.num_frames, "pixels": clips.size}, {}
    for tried in SIZES[along]:
        peaks[str(tried)] = _peak_gib(run, **{**size, along: tried}, rewired=rewired)
        if peaks[str(tried)] > budget:
            break
    return {"budget": budget, "peaks": peaks}


def resolution_cells(options: Options) -> dict[str, Cell]:
    """What fits, predicted; without `quick`, the demo trained at what fits into a budget plain and rewired."""
    found: dict[str, Cell] = {
        f"fits / {'rewired' if rewired else 'plain'} / {along} / {RECIPE}": partial(
            largest, RECIPE, rewired=rewired, along=along
        )
        for rewired in (False, True)
        for along in SIZES
    }
    if not options.quick:
        shards = built(options, "demo")
        sizes = [size for plain, rewired in EQUAL_MEMORY for size in (("plain", plain), ("rewired", rewired))]
        for seed in range(options.seeds):
            for form, pixels in sizes:
                epochs = DEMO_EPOCHS[False]
                run = detector_run(shards, f"end to end, {form}", RESOLUTION_SETTING, epochs=epochs, seed=seed)
                run = replace(run, data=replace(run.data, clips=replace(run.data.clips, size=pixels)))
                key = cell_key(f"mAP / {form} / {pixels} pixels", RESOLUTION_SETTING, epochs=epochs, seed=seed)
                found[key] = partial(trained_and_weighed, run)
    return found


def trained_and_weighed(run: RunConfig) -> Figures:
    """A training's summary, and the predicted peak of one of its steps."""
    from recipes import WHOLE, peak_gib

    return {**trained(run), "peak_gib": peak_gib(run, **({} if run.backbone.rewired else WHOLE))}


def show_resolution(done: Mapping[str, Figures], pictures: Path) -> list[str]:
    """The largest that fits, the curves, and mAP by size."""
    fits: dict[str, dict[str, Figures]] = {"plain": {}, "rewired": {}}
    for key, figures in done.items():
        if key.startswith("fits"):
            _, form, along, _ = key.split(" / ")
            fits[form][along] = figures
    lines: list[str] = []
    if any(fits.values()):
        rows = [(form, *(_most(found.get(along)) for along in SIZES)) for form, found in fits.items()]
        lines += [
            f"`{RECIPE}`: the largest of the sizes tried whose step needs at most {BUDGET_GIB:g} GiB of "
            "activations on one rank (predicted by the dry run; parameters and optimizer come on top):",
            "",
            *table(("form", "frames at 224 x 224", "pixels a side at 1024 frames"), rows),
            "",
        ]
    curves = {
        form: {float(size): peak for size, peak in found["frames"]["peaks"].items()}
        for form, found in fits.items()
        if "frames" in found
    }
    if curves:
        lines += [f"![Peak of a step by frames]({pictures.name}/resolution.svg)", ""]
        draw_lines(pictures / "resolution.svg", curves, x="frames of 224 x 224", y="peak of a step, GiB", log=True)
    trainings: dict[str, dict[tuple[str, str], dict[str, Figures]]] = {}
    for key, figures in done.items():
        if key.startswith("mAP"):
            _, form, pixels, *setting, seed = key.split(" / ")
            trainings.setdefault(", ".join(setting), {}).setdefault((form, pixels), {})[seed] = figures
    if not trainings:
        return [*lines, "mAP against size at equal memory, on the demo: not run."]
    for setting_name, forms in trainings.items():
        rows = [
            (
                f"{form}, {pixels}",
                f"{_peak(seeds):.3f}",
                mean_and_interval([run["average_map"] for run in seeds.values()]),
                str(len(seeds)),
            )
            for (form, pixels), seeds in sorted(forms.items())
        ]
        head = ("form and pixels a side", "peak of a step, GiB (predicted)", "average mAP, %", "seeds")
        lines += [f"**{setting_name}**, on the demo", "", *table(head, rows), "", *_at_equal_memory(forms), ""]
    return lines[:-1]


def _peak(seeds: Mapping[str, Figures]) -> float:
    return next(iter(seeds.values()))["peak_gib"]


def _at_equal_memory(forms: Mapping[tuple[str, str], Mapping[str, Figures]]) -> Iterator[str]:
    """The claim, a line for each plain size: the most pixels that fit into its memory rewired score higher."""
    for (form, pixels), plain in sorted(forms.items()):
        fitting = {
            _peak(seeds): (name, seeds)
            for (other, name), seeds in forms.items()
            if form == "plain" and other == "rewired" and _peak(seeds) <= EQUAL * _peak(plain)
        }
        name, rewired = fitting[max(fitting)] if fitting else ("", {})
        if both := sorted(rewired.keys() & plain.keys()):
            away = [rewired[seed]["average_map"] - plain[seed]["average_map"] for seed in both]
            ratio = max(fitting) / _peak(plain)
            yield f"- Rewired at {name} ({ratio:.2f} x the memory), less plain at {pixels}: {verdict(away, aim=0.0)}"


def _most(figures: Figures | None) -> str:
    """The largest size within the budget."""
    if figures is None:
        return "not run"
    return str(max((int(size) for size, peak in figures["peaks"].items() if peak <= figures["budget"]), default="none"))


def precision_cells(options: Options) -> dict[str, Cell]:
    """Error against depth and number format; without `quick`, the demo in bf16 and fp32 too."""
    quick = ("--quick",) if options.quick else ()
    found: dict[str, Cell] = {f"errors{' (quick)' * options.quick}": partial(script, "precision", *quick)}
    if not options.quick:
        shards = built(options, "demo")
        for name, changes in FORMATS.items():
            run = demo_run(shards, epochs=DEMO_EPOCHS[False], seed=0)
            run = replace(
                run,
                engine=replace(run.engine, precision=changes.get("precision", "fp32")),
                backbone=replace(run.backbone, grid=changes.get("grid", "auto")),
            )
            # One seed: bf16 takes several times as long on a CPU.
            found[f"mAP / {name} / {run.training.epochs} epochs / seed 0"] = partial(trained, run)
    return found


def show_precision(done: Mapping[str, Figures], _: Path) -> list[str]:
    """Errors by depth and states; mAP by number format."""
    rows, trainings = [], {}
    for key, figures in done.items():
        if key.startswith("mAP"):
            trainings.setdefault(key.split(" / ")[1], []).append(figures["average_map"])
            continue
        for depth, kinds in figures.items():
            for states, row in kinds.items() if isinstance(kinds, dict) else ():
                errors = (f"{row[name]:.1e}" for name in ("state", "gradient", "noise"))
                rows.append((f"{depth} blocks, {states}", *errors, f"{row['time']:.2f}"))
    head = ("depth and states", "rebuilt first state", "first gradient", "bfloat16's own noise", "time")
    lines = [
        "Transformer blocks that compute in bfloat16: relative errors against a run that keeps all activations, and",
        "time against float32 states without a grid (times are of a busy machine).",
        "",
        *table(head, rows),
        "",
    ]
    if not trainings:
        return [*lines, "The effect on mAP: not run."]
    scores = [
        (name, mean_and_interval(trainings[name]), str(len(trainings[name])))
        if name in trainings
        else (name, "not run", "")
        for name in FORMATS
    ]
    return [*lines, *table((f"demo, {DEMO_EPOCHS[False]} epochs, in", "average mAP, %", "seeds"), scores)]
