"""What files call their subsets -> what recipes look for: "training" and "validation"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from re2tal.data.building.annotations import Annotations
from re2tal.structures import find_subset


def rename_subsets(annotations: Annotations, pairs: Sequence[tuple[str, str]]) -> Annotations:
    """The same annotations with the subset to train on called "training", and that to score "validation".

    `pairs` lists what the two are called in the files of a data set; the first pair that is there whole decides.
    """
    names = recipe_names(annotations.subsets, pairs)
    if not names:
        return annotations
    said = " and ".join(f"{old!r} as {new!r}" for old, new in names.items() if old != new)
    subsets = {
        names.get(old, old): tuple(replace(record, subset=names.get(old, old)) for record in records)
        for old, records in annotations.subsets.items()
    }
    return replace(
        annotations,
        subsets=subsets,
        notes=(
            *annotations.notes,
            f"subset {said}, as recipes call them; --subsets takes these names, `re2tal evaluate` the file's",
        ),
    )


def recipe_names(subsets: Iterable[str], pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Subset -> what recipes call it, for those that `rename_subsets` would rename."""
    subsets = list(subsets)
    # The usual names first: a file that has them needs no renaming, whatever else it has.
    for pair in (("training", "validation"), *pairs):
        found = [find_subset(name, subsets) for name in pair]
        names = {old: new for old, new in zip(found, ("training", "validation"), strict=True) if old is not None}
        if len(names) == 2:
            return {} if all(find_subset(new, [old]) for old, new in names.items()) else names
    return {}
