"""Recipes listed, described, and written into the page that people read."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from re2tal.config import AnyRun, RecognitionConfig, RunConfig
from re2tal.data.streaming.windows import ResizeWhole, Slide, Trimmed
from re2tal.files import linked, write_atomically
from re2tal.planning.choice import plan_step
from re2tal.recipes import RECIPES, find_recipe
from re2tal.recipes.about import About, about
from re2tal.runs.deepspeed_presets import DEFAULT_PRESET, find_preset
from re2tal.runs.devices import default_device
from re2tal.tables import text_table

BEGIN, END = "<!-- written by: re2tal recipes --write docs/recipes.md -->", "<!-- end of what it writes -->"
NONE_PUBLISHED = "none published"


def list_recipes() -> None:
    """Print a line per recipe."""
    runs = {name: find_recipe(name) for name in RECIPES}
    rows = [("name", "backbone", "localizer", "mAP")] + [
        (name, _backbone(run), _localizer(run), about(name, run).expected or NONE_PUBLISHED)
        for name, run in runs.items()
    ]
    print(text_table(rows, align="<<<>", rules=(1,)))
    print("mAP: what the source publishes; nothing here was reproduced. `re2tal recipes NAME` says more of one")


def show_recipe(name: str, *, memory: bool) -> None:
    """Print what is known of a recipe; with `memory`, plan its step too, which takes seconds."""
    run = find_recipe(name)
    lines = [*_lines(name, run, about(name, run))]
    if memory:
        ranks, device = about(name, run).ranks, default_device()
        planned = plan_step(run, find_preset(DEFAULT_PRESET), world_size=ranks, num_classes=20, device=device)
        size = f"{planned.memory.peak / 2**30:.2f} GiB a rank"
        lines.append(("memory", f"{size}, planned for {ranks} on {device.type}"))
    wrapped = ((key, textwrap.wrap(text, 96, break_long_words=False)) for key, text in lines)
    print(text_table([("" if n else key, line) for key, parts in wrapped for n, line in enumerate(parts)], align="<"))


def write_page(path: Path) -> None:
    """Replace what lies between the two marks in a Markdown page; ValueError where they are not there."""
    replace_between(path, BEGIN, END, page())


def replace_between(path: Path, begin: str, end: str, written: str) -> None:
    """Replace what lies between two lines of a page; ValueError where they are not there, each once."""
    text = path.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{path} has no place for what is written: it needs the line {begin!r} and, below it, {end!r}")
    before, _, rest = text.partition(begin)
    write_atomically(linked(path), f"{before}{begin}\n{written}{end}{rest.partition(end)[2]}")


def page() -> str:
    """All recipes as a Markdown table, and in what those with a published figure differ from their source."""
    told = {name: about(name, find_recipe(name)) for name in RECIPES}
    lines = ["", "| recipe | data | backbone | localizer | published |", "| --- | --- | --- | --- | --- |"]
    for name in RECIPES:
        run = find_recipe(name)
        data, localizer = _data(run).replace("whole videos as", "whole,"), _localizer(run).replace("class-", "")
        lines.append(f"| `{name}` | {data} | {_backbone(run)} | {localizer} | {told[name].expected} |")
    lines += ["", "Who published the figures:", "", *_grouped({name: (one.source,) for name, one in told.items()})]
    lines += ["", "Where they differ from their source:", "", *_grouped({n: one.differs for n, one in told.items()})]
    return "\n".join([*lines, "", ""])


def _grouped(told: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """Lines of a Markdown list: each sentence, and the names of what it is said of."""
    groups: dict[str, list[str]] = {}
    for name, sentences in told.items():
        for sentence in filter(None, sentences):
            groups.setdefault(sentence, []).append(f"`{name}`")
    for sentence, names in groups.items():
        whole = f"- {sentence[0].upper()}{sentence[1:]}: {', '.join(names)}."
        yield from textwrap.wrap(whole, 108, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _lines(name: str, run: AnyRun, told: About) -> Iterator[tuple[str, str]]:
    program = "re2tal train" if told.ranks == 1 else f"deepspeed --num_gpus {told.ranks} launch/train.py"
    yield "recipe", name
    yield "command", f"{program} --recipe {name} --data.shards {run.data.shards}"
    if run.backbone.name == "features":
        yield "features", f"{run.backbone.feature_channels} channels, written by re2tal features extract or pack"
    clips = run.engine.batch_size * run.engine.gradient_accumulation
    yield "made for", f"{told.ranks} rank{'s' * (told.ranks > 1)} of {clips}: {told.ranks * clips} clips a step"
    yield "data", _data(run)
    yield "backbone", _backbone(run)
    yield "localizer", _localizer(run)
    yield "mAP", f"{told.expected} ({told.source}); not reproduced here" if told.expected else NONE_PUBLISHED
    for sentence in told.differs:
        yield "differs", sentence
    if isinstance(run, RunConfig) and getattr(run.localizer, "class_agnostic", False):
        yield "classes", "it finds actions without their class; name them: re2tal detect --video-classes FILE --top-k 2"


def _data(run: AnyRun) -> str:
    what = "steps" if run.backbone.name == "features" else "frames"
    match run.data.clips.windowing:
        case ResizeWhole(num_frames=count):
            return f"whole videos as {count} {what}"
        case Slide(num_frames=count, frames_per_second=None):
            return f"windows of {count} {what}"
        case Slide(num_frames=count, frames_per_second=float(rate)):
            return f"windows of {count} {what}, {count / rate:.0f} s"
        case Trimmed(num_frames=count):
            return f"trimmed clips, {count} {what}"
    raise AssertionError(run.data.clips.windowing)


def _backbone(run: AnyRun) -> str:
    backbone = run.backbone
    if backbone.name == "features":
        return f"none: {backbone.feature_channels} channels"
    if backbone.adapter != "none":
        return f"{backbone.name}, adapters"
    return f"{backbone.name}, {'rewired' if backbone.rewired and backbone.beta else 'plain'}"


def _localizer(run: AnyRun) -> str:
    if isinstance(run, RecognitionConfig):
        return "none: recognition"
    agnostic = ", class-agnostic" if run.localizer.class_agnostic else ""
    return f"{run.localizer.name}{agnostic}"
