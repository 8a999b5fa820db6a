"""Parts `features` (demo) and `real` (URFD): the same localizer on a frozen backbone and end to end."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from evidence.cells import Cell, Figures, Options, mean_and_interval, table, verdict
from evidence.pictures import bars
from evidence.recognizers import BACKBONES, SIZES, Original, original
from evidence.training import (
    FORMS,
    FROM_DEMO,
    FROM_DEMO_FORMS,
    FROM_PLAIN,
    FROM_RECOGNITION,
    IN_SEGMENTS,
    QUICK_FORMS,
    STARTS_PLAIN,
    built,
    cell_key,
    detector_run,
    forms_of,
    on_demo,
    settings,
    started,
    trained,
)
from re2tal.config import RunConfig

URFD_EPOCHS = {True: 10, False: 30}


ABOUT_DEMO = (
    "*From recognition*: the plain recognizer of part `recognition` with the same seed, then frozen: its clips show",
    "the same six motions, trimmed, which is more than a detector is told. There are no adapters for SlowFast: LoRA",
    "updates linear layers.",
)
ABOUT_URFD = (
    "46 training and 24 validation videos (`re2tal datasets urfd`), pictures of 48 x 48, mirrored and cropped. *From",
    "the demo*: a detector that was trained on the demo's drawn motions (seed 0 of `features`) is the start, as a",
    "network trained on Kinetics is the paper's; all seeds start from the same one, the plain form and the one in",
    "segments from a plain one. *In segments*: merged by extrapolation every 2 branches, which is the plain network's",
    "function (SlowFast's but for the place of its ReLUs). In a stage of this SlowFast one block of two is residual,",
    "so it takes no more memory than the paper's merge; a deeper network keeps two states a segment.",
)


def demo_cells(options: Options) -> dict[str, Cell]:
    """On the demo's videos, whose classes are motions. Those that real video starts from are kept."""
    cells: dict[str, Cell] = {}
    for setting in settings(options):
        for seed in range(options.seeds):
            for form in QUICK_FORMS if options.quick else forms_of(setting):
                run, folder = on_demo(options, form, setting, seed=seed)
                keep = folder if form.startswith("end to end") else None
                cells[cell_key(form, setting, epochs=run.training.epochs, seed=seed)] = partial(trained, run, keep=keep)
            if setting[0] == BACKBONES[0] and not options.quick:
                run, _ = on_demo(options, FROM_RECOGNITION, setting, seed=seed)
                cells[cell_key(FROM_RECOGNITION, setting, epochs=run.training.epochs, seed=seed)] = partial(
                    recognized_first, run, original(options, SIZES[False], setting[0], seed=seed)
                )
    return cells


def recognized_first(run: RunConfig, recognizer: Original) -> Figures:
    """`run`, its frozen backbone from the recognizer."""
    weights = str(recognizer.kept() / "model.safetensors")
    return trained(replace(run, backbone=replace(run.backbone, weights=weights)))


def urfd_cells(options: Options) -> dict[str, Cell]:
    """On real untrimmed video; mirrored and cropped pictures show the same actions."""
    shards, epochs, cells = built(options, "urfd"), URFD_EPOCHS[options.quick], dict[str, Cell]()
    for setting in settings(options):
        for seed in range(options.seeds):
            for form in QUICK_FORMS if options.quick else (*FROM_DEMO_FORMS, *forms_of(setting)):
                run = detector_run(shards, form, setting, epochs=epochs, seed=seed)
                clips = replace(run.data.clips, flip=True, crop_area=(0.5, 1.0))
                run = replace(run, data=replace(run.data, clips=clips))
                measure = partial(trained, run)
                if form in FROM_DEMO_FORMS:
                    before = STARTS_PLAIN[0] if form.startswith((*STARTS_PLAIN, FROM_PLAIN)) else "end to end, rewired"
                    measure = partial(started, run, *on_demo(options, before, setting, seed=0))
                cells[cell_key(form, setting, epochs=epochs, seed=seed)] = measure
    return cells


def show_demo(done: Mapping[str, Figures], pictures: Path) -> list[str]:
    """Of the demo."""
    return [*ABOUT_DEMO, *_show(done, pictures, "features")]


def show_urfd(done: Mapping[str, Figures], pictures: Path) -> list[str]:
    """Of URFD."""
    return [*ABOUT_URFD, *_show(done, pictures, "real")]


def _show(done: Mapping[str, Figures], pictures: Path, name: str) -> list[str]:
    settings: dict[tuple[str, ...], dict[str, dict[str, Figures]]] = {}
    for key, figures in done.items():
        form, *setting, seed = key.split(" / ")
        settings.setdefault(tuple(setting), {}).setdefault(form, {})[seed] = figures
    lines: list[str] = []
    longest_first = sorted(settings.items(), key=lambda item: int(item[0][-1].split()[0]), reverse=True)
    for setting, forms in longest_first:
        lines += ["", f"**{', '.join(setting)}**", "", *_table(forms)]
        lines += ["", *_verdict(forms)]
    # Forms of one seed are drawn where there is nothing better.
    least = min(2, max(len(seeds) for _, forms in longest_first for seeds in forms.values()))
    heights = {
        f"{setting[0].removesuffix('_nano')}, {form}": [one["average_map"] for one in seeds.values()]
        for setting, forms in longest_first
        for form, seeds in forms.items()
        if len(seeds) >= least
    }
    bars(pictures / f"{name}.svg", heights, label="average mAP, %")
    return [*lines, "", f"![Average mAP by form]({pictures.name}/{name}.svg)"]


def _table(forms: Mapping[str, Mapping[str, Figures]]) -> list[str]:
    rows = []
    for form in sorted(forms, key=(FORMS[0], FROM_RECOGNITION, *FORMS[1:], *FROM_DEMO_FORMS).index):
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
        ("end to end, rewired", FROM_RECOGNITION, 5.0),
        ("end to end, rewired", "end to end, plain", -1.0),
        (f"end to end, rewired{FROM_DEMO}", f"frozen{FROM_DEMO}", 5.0),
        (f"end to end, rewired{FROM_DEMO}", f"end to end, plain{FROM_DEMO}", -1.0),
        (f"end to end, rewired{FROM_DEMO}", "frozen at random", 5.0),
        (IN_SEGMENTS + FROM_DEMO, "frozen at random", 5.0),
        (IN_SEGMENTS + FROM_DEMO, f"end to end, plain{FROM_DEMO}", -1.0),
        (IN_SEGMENTS + FROM_DEMO, f"end to end, rewired{FROM_DEMO}", 0.0),
        (IN_SEGMENTS + FROM_DEMO, FROM_PLAIN, 0.0),
        (FROM_PLAIN, "frozen at random", 5.0),
        (FROM_PLAIN, f"end to end, plain{FROM_DEMO}", -1.0),
        (FROM_PLAIN, f"end to end, rewired{FROM_DEMO}", 0.0),
    )
    lines = []
    for form, other, aim in claims:
        seeds = sorted(set(forms.get(form, {})) & set(forms.get(other, {})))
        if not seeds:
            continue
        away = [forms[form][seed]["average_map"] - forms[other][seed]["average_map"] for seed in seeds]
        lines.append(f"- {form.capitalize()}, less {other}: {verdict(away, aim=aim)}")
    return lines
