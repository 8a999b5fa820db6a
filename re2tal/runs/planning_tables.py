"""Memory as tables: a run in all forms of its backbone, and the page of chosen recipes and lengths of video."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from re2tal.config import AnyRun, RunConfig
from re2tal.data.streaming.windows import Slide
from re2tal.planning.forms import FORMS, in_form, memory_on_ranks
from re2tal.recipes import find_recipe
from re2tal.runs.deepspeed_presets import find_preset
from re2tal.runs.recipes import replace_between
from re2tal.tables import text_table

BEGIN, END = "<!-- written by: re2tal plan --write docs/backbones.md -->", "<!-- end of what it writes -->"
RANKS = (1, 8, 64)
PRESET = "zero3"
CHOSEN = (
    *("thumos14_re2swin_tiny", "thumos14_adatad_videomae_base", "thumos14_adatad_videomae_giant"),
    *("thumos14_adatad_videomae_giant_224", "thumos14_re2vjepa2_giant", "thumos14_re2internvideo2_1b"),
)
LONG, LENGTHS, CLIPS_AT_ONCE = "thumos14_adatad_videomae_giant", (768, 3072, 9984, 29952), 16
CPU = torch.device("cpu")

Table = tuple[str, str, dict[str, Callable[[], list[str]]]]
"""Head, rule, and what makes the other cells of a row, by its first."""


def print_forms(run: AnyRun, ds: str, *, num_classes: int, device: torch.device) -> None:
    """Print GiB of a rank of `run`, in every form, on 1, 8 and 64 ranks."""
    rows = [(form, *_on_ranks(in_form(run, form), ds, num_classes, device)) for form in FORMS]
    print(text_table([("GiB of a rank", *(f"{number} ranks" for number in RANKS)), *rows], align="<>>>"))


def write_page(path: Path, *, recipes: Sequence[str] = CHOSEN, lengths: Sequence[int] = LENGTHS) -> None:
    """Replace what lies between the marks in a Markdown page by the tables of chosen recipes; takes minutes.

    The page is written after each row: where somebody stops it, rows that were not reached stay as they were.
    """
    tables = [_recipes(recipes), _lengths(lengths)]
    # The rows as they are: where planning is stopped, they stay.
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    rows = {line.split("|")[1].strip(): line for line in lines}

    def write() -> None:
        lines = [""]
        for head, rule, makers in tables:
            lines += [head, rule, *(rows[first] for first in makers if first in rows), ""]
        replace_between(path, BEGIN, END, "\n".join([*lines, ""]))

    write()  # which finds out at once whether the page has a place for them
    for _, _, makers in tables:
        for first, make in makers.items():
            rows[first] = f"| {first} | {' | '.join(make())} |"
            print(rows[first], flush=True)
            write()


def _recipes(names: Sequence[str]) -> Table:
    makers: dict[str, Callable[[], list[str]]] = {}
    for name in names:
        run = find_recipe(name)
        makers[f"`{name}`, {run.backbone.name}"] = partial(_in_all_forms, run)
    head = f"| GiB of a rank, {' / '.join(map(str, RANKS))} ranks | frames | {' | '.join(FORMS)} |"
    return head, f"| --- | --- |{' --- |' * len(FORMS)}", makers


def _in_all_forms(run: AnyRun) -> list[str]:
    clips = run.data.clips
    # 20 classes, as THUMOS-14 has: their number hardly changes the memory.
    cells = [" / ".join(_on_ranks(in_form(run, form), PRESET, 20, CPU)) for form in FORMS]
    return [f"{clips.windowing.num_frames} x {clips.size} x {clips.size}", *cells]


def _lengths(lengths: Sequence[int]) -> Table:
    run = in_form(find_recipe(LONG), "rewired")
    assert isinstance(run, RunConfig)
    size = run.data.clips.size
    head = f"| frames of {size} x {size}, {run.backbone.name} rewired, 8 ranks | all clips at once | 16 clips at once |"
    return head, "| --- | --- | --- |", {f"{length:,}": partial(_of_length, run, length) for length in lengths}


def _of_length(run: RunConfig, length: int) -> list[str]:
    """GiB of a rank of 8, with windows of so many frames; the localizer's grid stays that of the recipe."""
    clips = replace(run.data.clips, windowing=Slide(num_frames=length, frames_per_second=7.5))
    longer = replace(run, data=replace(run.data, clips=clips))
    cells = []
    for clips_at_once in (None, CLIPS_AT_ONCE):
        one = replace(longer, backbone=replace(run.backbone, clips_at_once=clips_at_once))
        (memory,) = memory_on_ranks(one, find_preset(PRESET), ranks=[8], num_classes=20, device=CPU)
        cells.append(_gib(memory.peak))
    return cells


def _on_ranks(run: AnyRun | None, ds: str, num_classes: int, device: torch.device) -> list[str]:
    if run is None:
        return ["-"] * len(RANKS)
    found = memory_on_ranks(run, find_preset(ds), ranks=RANKS, num_classes=num_classes, device=device)
    return [_gib(memory.peak) for memory in found]


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
