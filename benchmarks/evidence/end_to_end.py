"""Parts `features` (demo) and `real` (URFD): the same localizer on a frozen backbone and end to end."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from evidence.cells import Cell, Figures, Options, mean_and_interval, table
from evidence.pictures import bars
from evidence.training import (
    FORMS,
    FROM_DEMO,
    FROM_DEMO_FORMS,
    QUICK_FORMS,
    built,
    cell_key,
    detector_run,
    on_demo,
    settings,
    started,
    trained,
)

URFD_EPOCHS = {True: 10, False: 30}


EARLIER_URFD = (
    "46 training and 24 validation videos (`re2tal datasets urfd`), pictures of 48 x 48. Longer runs of 2026-11-29, by",
    "hand on two ranks, one seed each, average mAP end to end (rewired) against frozen at random: 38.2 against 48.8 %",
    "(50 epochs, no augmentation), 42.8 against 43.8 % (100 epochs, mirrored, cropped, colours), 43.6 against 46.5 %",
    "(60 epochs at 96 x 96, the backbone's rate at 3e-4). There training end to end did not beat random features; why",
    "is not settled. Pretrained weights were in none of these runs. Below: one process, mirrored and cropped pictures.",
)


def demo_cells(options: Options) -> dict[str, Cell]:
    """On the demo's videos, whose classes are motions. Those that real video starts from are kept."""
    cells: dict[str, Cell] = {}
    for setting in settings(options):
        for seed in range(options.seeds):
            for form in QUICK_FORMS if options.quick else FORMS:
                run, folder = on_demo(options, form, setting, seed=seed)
                keep = folder if form.startswith("end to end") else None
                cells[cell_key(form, setting, epochs=run.training.epochs, seed=seed)] = partial(trained, run, keep=keep)
    return cells


def urfd_cells(options: Options) -> dict[str, Cell]:
    """On real untrimmed video; mirrored and cropped pictures show the same actions."""
    shards, epochs, cells = built(options, "urfd"), URFD_EPOCHS[options.quick], dict[str, Cell]()
    for setting in settings(options):
        for seed in range(options.seeds):
            for form in QUICK_FORMS if options.quick else (*FROM_DEMO_FORMS, *FORMS):
                run = detector_run(shards, form, setting, epochs=epochs, seed=seed)
                clips = replace(run.data.clips, flip=True, crop_area=(0.5, 1.0))
                run = replace(run, data=replace(run.data, clips=clips))
                measure = partial(trained, run)
                if form.endswith(FROM_DEMO):
                    before = "end to end, plain" if "plain" in form else "end to end, rewired"
                    measure = partial(started, run, *on_demo(options, before, setting, seed=0))
                cells[cell_key(form, setting, epochs=epochs, seed=seed)] = measure
    return cells


def show_demo(done: Mapping[str, Figures], pictures: Path) -> list[str]:
    """Of the demo."""
    note = (
        "End to end, rewired, for 12 epochs is the same training as that of `precision` in fp32: what one of the two",
        "parts measured may stand in both.",
    )
    return [*note, *_show(done, pictures, "features")]


def show_urfd(done: Mapping[str, Figures], pictures: Path) -> list[str]:
    """Of URFD."""
    return [*EARLIER_URFD, *_show(done, pictures, "real")]


def _show(done: Mapping[str, Figures], pictures: Path, name: str) -> list[str]:
    settings: dict[tuple[str, ...], dict[str, dict[str, Figures]]] = {}
    for key, figures in done.items():
        form, *setting, seed = key.split(" / ")
        settings.setdefault(tuple(setting), {}).setdefault(form, {})[seed] = figures
    lines: list[str] = []
    for setting, forms in settings.items():
        lines += ["", f"**{', '.join(setting)}**", "", *_table(forms)]
        lines += ["", *_verdict(forms)]
    first = max(settings.values(), key=len)
    heights = {form: [one["average_map"] for one in seeds.values()] for form, seeds in first.items()}
    bars(pictures / f"{name}.svg", heights, label="average mAP, %")
    return [*lines, "", f"![Average mAP by form]({pictures.name}/{name}.svg)"]


def _table(forms: Mapping[str, Mapping[str, Figures]]) -> list[str]:
    rows = []
    for form in sorted(forms, key=(*FORMS, *FROM_DEMO_FORMS).index):
        runs = forms[form].values()
        values = [run["average_map"] for run in runs]
        by_tiou = [statistics.fmean(run["map"][tiou] for run in runs) for tiou in next(iter(runs))["map"]]
        seconds = statistics.fmean(run["train_seconds"] for run in runs)
        last = f"{100 * by_tiou[0]:.1f}", f"{100 * by_tiou[-1]:.1f}", f"{seconds:.0f}", str(len(values))
        rows.append((form, mean_and_interval(values), *last))
    head = ("form", "average mAP, %", "at the lowest tIoU", "at the highest", "training, s", "seeds")
    return list(table(head, rows))


def _verdict(forms: Mapping[str, Mapping[str, Figures]]) -> Sequence[str]:
    """Of each start, the two claims: rewired against frozen, at least +5 points; and against plain, within 1 point."""
    claims = (
        ("end to end, rewired", "frozen at random", 5.0),
        ("end to end, rewired", "end to end, plain", -1.0),
        (f"end to end, rewired{FROM_DEMO}", f"frozen{FROM_DEMO}", 5.0),
        (f"end to end, rewired{FROM_DEMO}", f"end to end, plain{FROM_DEMO}", -1.0),
        (f"end to end, rewired{FROM_DEMO}", "frozen at random", 5.0),
    )
    lines = []
    for form, other, aim in claims:
        seeds = sorted(set(forms.get(form, {})) & set(forms.get(other, {})))
        if not seeds:
            continue
        away = [forms[form][seed]["average_map"] - forms[other][seed]["average_map"] for seed in seeds]
        wanted = f"aim: at least {aim:+.0f}"
        if len(seeds) == 1:
            verdict = f"{100 * away[0]:+.1f} points ({wanted}). One seed, so no interval and no verdict."
        else:
            said = "reached" if 100 * statistics.fmean(away) >= aim else "**not reached**"
            verdict = f"{mean_and_interval(away)} points, paired by seed ({wanted}): {said}."
        lines.append(f"- {form.capitalize()}, less {other}: {verdict}")
    return lines
