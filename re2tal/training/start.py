"""A trained model as the start of another network: other classes, another size of what stands on the backbone.

    layers alike in names and shapes  taken
    rows that belong to classes       taken class by class, where both networks have a class of that name
    of another shape, or not there    the whole layer as it was initialised
    the backbone                      whole, or it is an error

Everything is counted, and what was not taken is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from re2tal.tables import text_table
from re2tal.training.export import ModelFile

Fate = Literal["taken", "by class", "of another shape", "not in the file", "not wanted"]
COLUMNS: tuple[Fate, ...] = ("taken", "by class", "of another shape", "not in the file", "not wanted")
MOST_LISTED = 8
ROW_OF_CLASS = Mapping[str, tuple[int, int]]
"""Name of a tensor whose rows belong to classes -> (groups, rows before the first class of a group): with K classes it
has groups x (before + K) rows."""


@dataclass(frozen=True, slots=True)
class StartReport:
    """What a network took of a model file."""

    file: ModelFile
    fates: Mapping[str, tuple[Fate, int]]
    """Tensor of the network -> what became of it, and its numbers."""
    left: tuple[str, ...]
    """Tensors of the file that have no place in the network."""
    classes: tuple[str, ...]
    """Of the network."""
    rows: tuple[str, ...]
    """Tensors whose rows belong to classes."""

    def __str__(self) -> str:
        # With one layer of class rows initialised, no class is as it was trained.
        known = set(self.file.classes) if all(self.fates[name][0] == "by class" for name in self.rows) else set()
        kept = [label for label in self.classes if label in known]
        new, theirs = [label for label in self.classes if label not in known], set(self.classes)
        unused = [label for label in self.file.classes if label not in theirs]
        lines = [
            f"start from {self.file.path}; tensors, and numbers in them:",
            self._table(),
            f"classes: {len(kept)} as trained{_listed(kept)}, {len(new)} new{_listed(new)}, {len(unused)} of the start "
            f"not in this run{_listed(unused)}",
        ]
        if self.left:
            parts = Counter(_part(name) for name in self.left)
            lines.append("left in the file: " + ", ".join(f"{number} of {part}" for part, number in parts.items()))
        return "\n".join(lines)

    def _table(self) -> str:
        parts = list(dict.fromkeys(map(_part, self.fates)))
        shown = [fate for fate in COLUMNS if any(fate == found for found, _ in self.fates.values())]
        cells = [[_sizes(self.fates, part, fate) for fate in shown] for part in parts]
        return text_table([["", *shown], *([part, *row] for part, row in zip(parts, cells, strict=True))], align="<>")


def take_over(
    model: nn.Module, file: ModelFile, *, classes: tuple[str, ...], rows: ROW_OF_CLASS, not_wanted: Collection[str] = ()
) -> StartReport:
    """Gives `model`, built for `classes`, what fits it of a trained one; `not_wanted` tensors stay as they are.

    ValueError, before anything is changed, where the backbone is another one, or nothing fits.
    """
    own = model.state_dict()
    # Before anything else: a localizer on another backbone's features knows nothing.
    _check_backbone(own, file)
    file.check_clips(model)
    values: dict[str, Tensor] = {}
    fates: dict[str, tuple[Fate, int]] = {}
    for name, ours in own.items():
        fate, value = _fate(name, ours, file, classes=classes, rows=rows, not_wanted=not_wanted)
        fates[name] = (fate, ours.numel())
        if value is not None:
            values[name] = value
    # A bias means nothing without its weight: layers are taken whole.
    new_layers = {_layer(name) for name, (fate, _) in fates.items() if fate == "of another shape"}
    for name in [name for name in values if _layer(name) in new_layers]:
        fates[name] = ("of another shape", values.pop(name).numel())
    if not values:
        raise ValueError(
            f"nothing of {file.path} fits this run's network: no tensor has a name and shape in common; start from a "
            "run with the same backbone, or leave start_from out"
        )
    _put(values, model)
    return StartReport(file, fates, tuple(name for name in file.weights if name not in own), classes, tuple(rows))


def _put(values: Mapping[str, Tensor], model: nn.Module) -> None:
    """Without a copy where types agree: a file of weights stays mapped, and no rank holds it a second time."""
    parameters, buffers = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_buffers())
    for name, value in values.items():
        if name in parameters:
            parameters[name].data = value.to(parameters[name])
        else:
            buffers[name].copy_(value)


def _fate(
    name: str,
    ours: Tensor,
    file: ModelFile,
    *,
    classes: tuple[str, ...],
    rows: ROW_OF_CLASS,
    not_wanted: Collection[str],
) -> tuple[Fate, Tensor | None]:
    """What becomes of one tensor of the network, and its new value, if it gets one."""
    theirs = file.weights.get(name)
    if name in not_wanted:
        return "not wanted", None
    if theirs is None:
        return "not in the file", None
    if name in rows:
        value = _by_class(ours, theirs, classes=classes, known=file.classes, layout=rows[name])
        return ("of another shape", None) if value is None else ("by class", value)
    return ("taken", theirs) if ours.shape == theirs.shape else ("of another shape", None)


def _by_class(
    ours: Tensor, theirs: Tensor, *, classes: tuple[str, ...], known: tuple[str, ...], layout: tuple[int, int]
) -> Tensor | None:
    """`ours` with the rows of shared classes, and those before the first class, of `theirs`; None if they differ in
    more than the number of classes."""
    groups, before = layout
    if ours.shape[1:] != theirs.shape[1:] or len(theirs) != groups * (before + len(known)):
        return None
    value, source = ours.clone().unflatten(0, (groups, -1)), theirs.unflatten(0, (groups, -1))
    value[:, :before] = source[:, :before]
    for row, label in enumerate(classes):
        if label in known:
            value[:, before + row] = source[:, before + known.index(label)]
    return value.flatten(0, 1)


def _check_backbone(own: Mapping[str, Tensor], file: ModelFile) -> None:
    ours, theirs = (
        {name: tuple(value.shape) for name, value in tensors.items() if name.startswith("backbone.")}
        for tensors in (own, file.weights)
    )
    if ours != theirs:
        odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise ValueError(
            f"{file.path} has another backbone than this run: {len(odd)} tensors differ, such as {odd[0]}: "
            f"{theirs.get(odd[0])} in the file, {ours.get(odd[0])} here; give the run the backbone (and "
            "backbone.weights, where it names a folder) of its start, or leave start_from out"
        )


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _part(name: str) -> str:
    """ "backbone", "localizer.encoder", "classifier", ..."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if first == "localizer" else first


def _sizes(fates: Mapping[str, tuple[Fate, int]], part: str, fate: Fate) -> str:
    sizes = [size for name, (found, size) in fates.items() if found == fate and _part(name) == part]
    return f"{len(sizes)} ({sum(sizes):,})" if sizes else ""


def _listed(labels: list[str]) -> str:
    more = f", and {len(labels) - MOST_LISTED} more" if len(labels) > MOST_LISTED else ""
    return f" ({', '.join(labels[:MOST_LISTED])}{more})" if labels else ""
