"""Memory as tables: a run in all forms of its backbone, and the page of chosen recipes and lengths of video."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from re2tal.config import RunConfig
from re2tal.data.streaming.windows import Slide
from re2tal.planning.forms import FORMS, in_form, memory_on_ranks
from re2tal.recipes import find_recipe
from re2tal.runs.deepspeed_presets import find_preset
from re2tal.runs.recipes import replace_between
from re2tal.runs.tasks import AnyRun
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


def print_forms(run: AnyRun, ds: str, *, num_classes: int, device: torch.device) -> None:
    """Print GiB of a rank of `run`, in every form, on 1, 8 and 64 ranks."""
    rows = [(form, *_on_ranks(in_form(run, form), ds, num_classes, device)) for form in FORMS]
    print(text_table([("GiB of a rank", *(f"{number} ranks" for number in RANKS)), *rows], align="<>>>"))


def write_page(path: Path, *, recipes: Sequence[str] = CHOSEN, lengths: Sequence[int] = LENGTHS) -> None:
    """Replace what lies between the marks in a Markdown page by the tables of chosen recipes; takes minutes."""
    replace_between(path, BEGIN, END, "\n".join(["", *_recipes(recipes), "", *_lengths(lengths), "", ""]))


def _recipes(names: Sequence[str]) -> Iterator[str]:
    yield f"| GiB of a rank, {' / '.join(map(str, RANKS))} ranks | frames | {' | '.join(FORMS)} |"
    yield f"| --- | --- |{' --- |' * len(FORMS)}"
    for name in names:
        run = find_recipe(name)
        clips = run.data.clips
        cells = [" / ".join(_on_ranks(in_form(run, form), PRESET, 20, CPU)) for form in FORMS]
        frames = f"{clips.windowing.num_frames} x {clips.size} x {clips.size}"
        yield f"| `{name}`, {run.backbone.name} | {frames} | {' | '.join(cells)} |"


def _lengths(lengths: Sequence[int]) -> Iterator[str]:
    run = in_form(find_recipe(LONG), "rewired")
    assert isinstance(run, RunConfig)
    size = run.data.clips.size
    yield f"| frames of {size} x {size}, {run.backbone.name} rewired, 8 ranks | all clips at once | 16 clips at once |"
    yield "| --- | --- | --- |"
    for length in lengths:
        cells = [_gib(_of_length(run, length, clips)) for clips in (None, CLIPS_AT_ONCE)]
        yield f"| {length:,} | {' | '.join(cells)} |"


def _of_length(run: RunConfig, length: int, clips_at_once: int | None) -> int:
    """Bytes of a rank of 8, with windows of so many frames; the localizer's grid stays that of the recipe."""
    clips = replace(run.data.clips, windowing=Slide(num_frames=length, frames_per_second=7.5))
    backbone = replace(run.backbone, clips_at_once=clips_at_once)
    longer = replace(run, data=replace(run.data, clips=clips), backbone=backbone)
    (memory,) = memory_on_ranks(longer, find_preset(PRESET), ranks=[8], num_classes=20, device=CPU)
    return memory.peak


def _on_ranks(run: AnyRun | None, ds: str, num_classes: int, device: torch.device) -> list[str]:
    if run is None:
        return ["-"] * len(RANKS)
    found = memory_on_ranks(run, find_preset(ds), ranks=RANKS, num_classes=num_classes, device=device)
    return [_gib(memory.peak) for memory in found]


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
