"""The JSON form of a configuration. A key that no component knows is an error: a misspelt override must not train
something else."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from re2tal.backbones.weights import is_weights_file
from re2tal.config.schema import RUNS, AnyRun, RunConfig
from re2tal.config.unions import CHOICES, KindChoice
from re2tal.data.addresses.address import folder_address
from re2tal.files import write_atomically
from re2tal.options import flatten
from re2tal.strict_json import brief, read_json

T = TypeVar("T")


def save_config(path: Path, config: AnyRun) -> None:
    """Writes the JSON form of `config`, which `load_config` reads back as an equal one, with its paths absolute."""
    document = to_json(config)
    # The tag comes first, so that a reader sees which kind the keys after it are of.
    for choice in CHOICES[config.task]:
        holder, last = _holder(document, choice.key)
        holder[last] = {choice.tag: choice.name(config)} | holder[last]
    write_atomically(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def load_config(path: Path) -> RunConfig:
    """Reads the configuration of a detector's run. What it does not mention keeps its default.

    Raises FileNotFoundError, and ValueError that names the file, the key, its value and the nearest known key.
    """
    config = load_run(path)
    if not isinstance(config, RunConfig):
        raise ValueError(
            f"{path} is of a recognizer, which does not say when something happens (re2tal classify says what); give "
            f"the run of a detector (--backbone.weights {path.parent / 'model.safetensors'} starts one from it)"
        )
    return config


def load_run(path: Path) -> AnyRun:
    """As `load_config`, of either kind of run; its `task` says which, and without one it is a detector's."""
    document = read_json(path)
    # Before anything else is read: the task says which class reads it.
    task = document.get("task", "localization") if isinstance(document, dict) else "localization"
    if task not in tuple(RUNS):
        raise ValueError(f"{path}: task is {task!r}; known: {sorted(RUNS)}")
    try:
        for choice in CHOICES[task]:
            # Put in as objects, so that pydantic need not guess the kind from the keys that kinds share.
            _read_choice(document, choice)
        return _validated(RUNS[task], document)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def to_json(config: AnyRun) -> dict[str, Any]:
    """`config` as JSON values, without the tags that only a file needs: keys tell kinds apart where all are given.

    Paths are absolute, so that a run may go on from another working directory.
    """
    document = _adapter(type(config)).dump_python(config, mode="json")
    address = folder_address(config.data.shards)
    document["data"]["shards"] = str(address or config.data.shards.absolute())
    if config.start_from is not None:
        document["start_from"] = str(config.start_from.absolute())
    if isinstance(config, RunConfig) and config.evaluation.blocked_videos is not None:
        document["evaluation"]["blocked_videos"] = str(config.evaluation.blocked_videos.absolute())
    weights = config.backbone.weights
    # A name on a hub looks like a relative path; a file's name ends in a suffix of weights, or exists.
    if weights is not None and (is_weights_file(weights) or Path(weights).exists()):  # not a hub's name
        document["backbone"]["weights"] = str(Path(weights).absolute())
    return document


def _read_choice(document: Any, choice: KindChoice) -> None:
    """Puts the configuration that JSON values mean in their place in `document`, if they are there."""
    holder, last = _holder(document, choice.key)
    if last not in holder:
        return
    values = holder[last]
    if not isinstance(values, Mapping):
        raise ValueError(
            f"{choice.key} is {values!r}; give an object, its {choice.tag} one of {', '.join(choice.kinds)}"
        )
    kind = choice.kind(choice.meant_by(values))
    named = {field.name for field in dataclasses.fields(kind)}
    # The tag names the kind and is no field of it; of other unknown keys `meant_by` has told.
    holder[last] = _validated(kind, {key: values[key] for key in values if key in named}, inside=choice.key)


def _holder(document: Any, key: str) -> tuple[dict[str, Any], str]:
    """The object in `document` that has the last part of the dotted `key`, or an empty one, and this part."""
    *path, last = key.split(".")
    for part in path:
        document = document.get(part) if isinstance(document, dict) else None
    # An empty object where the document has nothing, or nonsense, there: the whole is validated later, with a full
    # message.
    return (document if isinstance(document, dict) else {}), last


def _validated(kind: type[T], values: Any, *, inside: str | None = None) -> T:
    """A `kind` of JSON values; `inside` is the dotted key where it stands. Raises ValueError with all that is wrong."""
    adapter = _adapter(kind)
    try:
        made = adapter.validate_python(values)
    except ValidationError as error:
        raise ValueError(_explain(error, kind, inside=inside)) from None
    _refuse_other_types(values, adapter.dump_python(made, mode="json"), key=inside)
    return made


def _refuse_other_types(given: Any, taken: Any, *, key: str | None) -> None:
    """ValueError where a number or truth value was made of something else, and for empty paths: pydantic takes true for
    1, "off" for false and "inf" for a number."""
    if isinstance(given, Mapping):
        for name, value in given.items():
            _refuse_other_types(value, taken[name], key=name if key is None else f"{key}.{name}")
    elif isinstance(given, list):
        for number, (one, other) in enumerate(zip(given, taken, strict=True)):
            _refuse_other_types(one, other, key=f"{key}.{number}")
    # `Path` takes it for the folder at hand.
    elif given == "" and taken == ".":
        raise ValueError(f"{key} is an empty path; name a file or a folder")
    # A kind that was put in as an object is neither, and was looked at by itself.
    elif isinstance(given, bool) != isinstance(taken, bool) or (isinstance(given, str) and not isinstance(taken, str)):
        raise ValueError(f"{key} is {json.dumps(given)}; if {taken} is meant, write {json.dumps(taken)}")


_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


def _adapter(run: type) -> TypeAdapter[Any]:
    if run not in _ADAPTERS:  # building one takes up to a tenth of a second
        for kind in _dataclasses_in(run):
            # Read by pydantic when it meets the class; on a class that already has it, this says the same again.
            with_config(ConfigDict(extra="forbid"))(kind)
        _ADAPTERS[run] = TypeAdapter(run)
    return _ADAPTERS[run]


def _dataclasses_in(kind: Any) -> Iterator[type]:
    """`kind` and every dataclass among the types of its fields, unions included."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        for option in typing.get_args(kind):
            yield from _dataclasses_in(option)
    elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
        yield kind
        for annotation in typing.get_type_hints(kind).values():
            yield from _dataclasses_in(annotation)


def _explain(error: ValidationError, kind: Any, *, inside: str | None) -> str:
    lines = []
    for fault in error.errors():
        parts = [str(part) for part in fault["loc"]]
        key = ".".join(parts if inside is None else [inside, *parts]) or "the document"
        if fault["type"] == "unexpected_keyword_argument":
            leaves = (name.split(".") for name, _ in flatten(_adapter(kind).dump_python(kind(), mode="json")))
            # With all beginnings: an unknown key may be the name of a whole part.
            known = {".".join(parts[:depth]) for parts in leaves for depth in range(1, len(parts) + 1)}
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            lines.append(f"unknown key {key}" + (f"; did you mean {nearest[0]}?" if nearest else ""))
        elif fault["type"] == "value_error":  # raised by a component, which names its field, or the whole key
            message = fault["msg"].removeprefix("Value error, ")
            named = re.split("[ =]", message)[0]
            is_field = inside is not None and named in {field.name for field in dataclasses.fields(kind)}
            lines.append(f"{inside}.{message}" if is_field else message)
        else:
            lines.append(f"{key} is {brief(fault['input'])}: {fault['msg']}")
    return "; ".join(lines)
