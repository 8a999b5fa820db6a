"""Reads anyone's weights into one of our networks, by renaming (and taking apart what is fused), and writes them back.

    file -> tensors by name -> layout and prefix, found from names -> our names -> names and shapes checked -> loaded

Nothing is ever unpickled: .safetensors, or torch files that hold tensors and plain containers only.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError  # the exception that torch.load raises for what it refuses to run
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

RENAMING = Callable[[Collection[str]], dict[str, str]]
REPACKING = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
RESHAPING = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]


def _as_they_are(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(given)


WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pyth")


def is_weights_file(name: str) -> bool:
    """Whether this is what a file of weights is called, in small letters or capitals; it need not exist."""
    return name.lower().endswith(WEIGHTS_SUFFIXES)


# What the code bases that train rewired networks do.
PAPERS_WIRING = {"unit": "branch", "merge": "mean", "segment": None, "beta": 1.0}

# Where training frameworks put the weights inside a checkpoint. The first that holds tensors is taken: moving averages,
# which the frameworks evaluate, before the weights that were trained; whole networks before V-JEPA's two encoders.
WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema", "params_ema"),
    *("state_dict", "model_state_dict", "model_state", "model", "net", "params", "module"),
    *("target_encoder", "encoder"),
)
MAX_NESTING = 4
"""Checkpoints hold weights at most so deep: `model.state_dict` is 2."""


@dataclass(frozen=True)
class Checkpoint:
    """What a weights file holds."""

    tensors: dict[str, Tensor]
    """By name, on the CPU."""
    taken_from: str
    """Where in the file they lay, such as "state_dict_ema"; empty for its top."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What the header of a safetensors file says."""


def each(rename: Callable[[str], str | None] = str, *, without: str = r"(?!)") -> RENAMING:
    """Renames entries one by one, without those whose name matches or is renamed to None."""
    unused = re.compile(without)
    return lambda keys: {key: name for key in keys if not unused.match(key) and (name := rename(key)) is not None}


UNCHANGED = each()


@dataclass(frozen=True)
class KeyLayout:
    """How one code base names the entries of a network that we call by other names."""

    name: str
    anchor: str
    """Regular expression for an entry that only this layout has, below any prefix such as `module.backbone.`."""
    to_ours: RENAMING = UNCHANGED
    """Their names, prefix removed -> {theirs: ours}, without what we have no use for: heads, constant tables."""
    from_ours: RENAMING = UNCHANGED
    """Our names -> {ours: theirs}."""
    unpack: REPACKING = dict
    """Their entries, prefix removed -> the same with fused ones in parts, which `to_ours` then renames."""
    pack: REPACKING = dict
    """The reverse of `unpack`."""
    reshape: RESHAPING = _as_they_are
    """Their entries under our names, and those of our network -> theirs in its shapes, where there is a rule for it:
    weights of a network for pictures, inflated to video."""
    optional: tuple[str, ...] = ()
    """Regular expressions for groups of our entries. A file may lack all of a group, which then stays as it was built,
    but not some of it."""
    wiring: Mapping[str, Any] | None = None
    """How networks are rewired whose weights this code base names so (see `rewire.wiring_of`); None for plain ones."""


@dataclass(frozen=True)
class LoadReport:
    """What a file was found to be, and what was done with it."""

    layout: str
    prefix: str
    loaded: tuple[str, ...]
    """Our names."""
    ignored: tuple[str, ...]
    """Their names: heads and tables of this network, and everything outside `prefix`."""
    kept: tuple[str, ...] = ()
    """Our names that the file does not hold and need not: they are as they were built."""


def load_weights(model: nn.Module, path: str | Path, *, layouts: Sequence[KeyLayout]) -> LoadReport:
    """Load a .safetensors or torch file in any of `layouts` into `model`; all of it fits, or nothing is loaded.

    Raises FileNotFoundError or ValueError, which names the file and every missing, unexpected or misshapen entry.
    """
    return load_state(model, read_state(path), layouts=layouts, what=f"{path}")


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, layouts: Sequence[KeyLayout], what: str) -> LoadReport:
    """As `load_weights`, of tensors that were read already; `what` names them in errors."""
    network = type(getattr(model, "encoder", model)).__name__  # the stock network inside, where it is clip-wise
    layout, prefix = _recognise(state, layouts, what=what, network=network)
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    inside = layout.unpack(inside)
    names = layout.to_ours(inside)
    wanted = model.state_dict()
    ours = layout.reshape({our_name: inside[key] for key, our_name in names.items()}, wanted)
    kept: dict[str, Tensor] = {}
    for group in layout.optional:
        members = {key: value for key, value in wanted.items() if re.fullmatch(group, key)}
        kept |= members if members.keys().isdisjoint(ours) else {}
    _check_fit(wanted, ours | kept, what=f"{what} ({layout.name} layout)", network=network)
    model.load_state_dict(ours | kept)
    ignored = [key for key in state if not key.startswith(prefix)]
    ignored += [prefix + key for key in inside if key not in names]
    return LoadReport(layout.name, prefix, tuple(ours), tuple(ignored), tuple(kept))


def export_state(model: nn.Module, *, layout: KeyLayout) -> dict[str, Tensor]:
    """The weights of `model` under the names of another code base; constant tables and heads are not in it."""
    state = model.state_dict()
    names = layout.from_ours(state)
    return layout.pack({name: state[key] for key, name in names.items()})


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU, unwrapped from what a training framework puts around them."""
    return read_checkpoint(path).tensors


def read_checkpoint(path: str | Path) -> Checkpoint:
    """As `read_state`, and where in the file the tensors were found.

    Raises FileNotFoundError, and ValueError for a folder, a damaged file, and one that would run code when read.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if is_weights_file(file.name))
        raise ValueError(
            f"{path} is a folder that holds {_shortened(files) or 'no weights file'}; name one file, of safetensors or "
            "torch"
        )
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    try:
        if path.suffix.lower() == ".safetensors":
            return _read_safetensors(path)
        # Many training scripts save their command line beside the weights; a Namespace only holds values.
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if (asked := re.search(r"GLOBAL (\S+)", str(error))) is None:
            raise ValueError(f"{path} is not a readable torch file: {_first_sentence(error)}") from error
        raise ValueError(
            f"{path} holds more than tensors, and reading it would run code from it ({asked[1]}); where you trust it, "
            f"load it and save its tensors alone: safetensors.torch.save_file(checkpoint['state_dict'], "
            "'weights.safetensors')"
        ) from error
    except Exception as error:  # bytes that are no torch file can make torch's reader stumble anywhere
        raise ValueError(f"{path} is not a readable torch file: {_first_sentence(error)}") from error
    return _unwrap(content, path)


def read_wiring(path: str | Path, *, layouts: Sequence[KeyLayout]) -> dict[str, Any] | None:
    """How the network was rewired whose weights a file holds, as its header tells, or its names in one of `layouts`.

    None for a plain one. Raises as `read_checkpoint` does, and ValueError for a header that tells of no wiring.
    """
    if Path(path).suffix.lower() == ".safetensors":
        with _opened(Path(path)) as file:
            names, metadata = list(file.keys()), file.metadata() or {}
        if "wiring" in metadata:
            return checked_wiring(_parsed(metadata["wiring"]), what=f"wiring in the header of {path}")
    else:
        names = list(read_state(path)) if layouts else []
    for layout in layouts:
        if layout.wiring is not None and any(map(_anchored(layout).fullmatch, names)):
            return dict(layout.wiring)
    return None


def checked_wiring(wiring: object, *, what: str) -> dict[str, Any] | None:
    """`wiring`, that of a rewired network or None for a plain one. ValueError, naming `what`, for anything else."""
    if wiring is None or isinstance(wiring, dict):
        return wiring
    raise ValueError(
        f"{what} is {wiring!r}, and not how a network was rewired ({', '.join(PAPERS_WIRING)}), so that nobody can "
        "tell what these weights compute; write them anew (re2tal export)"
    )


def _parsed(text: str) -> object:
    with suppress(ValueError):
        return json.loads(text)
    return text


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _read_safetensors(path: Path) -> Checkpoint:
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        return Checkpoint(tensors, "", file.metadata() or {})


def _first_sentence(error: Exception) -> str:
    """Without torch's advice to read the file unsafely."""
    sentence = str(error).partition("\n")[0].split(". ")[0]
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__


def _unwrap(content: object, path: Path) -> Checkpoint:
    if (found := _find_tensors(content)) is not None:
        return found
    parts = [str(key) for key in content] if isinstance(content, Mapping) else []
    raise ValueError(
        f"{path} holds no tensors by name, at its top or under {', '.join(WRAPPERS)}; it holds "
        f"{_shortened(parts) or f'a {type(content).__name__}'}. Save the weights alone in a file"
    )


def _find_tensors(content: object, places: tuple[str, ...] = ()) -> Checkpoint | None:
    """The first of `WRAPPERS` that holds tensors, else those that lie beside them (best_acc1, a mask token)."""
    if not isinstance(content, Mapping) or len(places) > MAX_NESTING:
        return None
    for place in WRAPPERS:
        if (found := _find_tensors(content.get(place), (*places, place))) is not None:
            return found
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return Checkpoint(tensors, ".".join(places)) if tensors else None


def _recognise(keys: Iterable[str], layouts: Sequence[KeyLayout], *, what: str, network: str) -> tuple[KeyLayout, str]:
    for layout in layouts:
        prefixes = sorted({found["prefix"] for found in map(_anchored(layout).fullmatch, keys) if found})
        if len(prefixes) > 1:
            raise ValueError(f"{what} holds {len(prefixes)} networks of this kind, under {prefixes}; keep one of them")
        if prefixes:
            return layout, prefixes[0]
    known = ", ".join(layout.name for layout in layouts)
    raise ValueError(
        f"{what} is not a checkpoint of {network} in a layout we know ({known}); its entries are called "
        f"{_shortened(keys)}; check that it belongs to this architecture"
    )


def _anchored(layout: KeyLayout) -> re.Pattern[str]:
    return re.compile(rf"(?P<prefix>(?:.*\.)?){layout.anchor}")


def _check_fit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], *, what: str, network: str) -> None:
    problems = []
    if missing := [key for key in wanted if key not in given]:
        problems.append(f"{len(missing)} missing: {_shortened(missing)}")
    if unexpected := [key for key in given if key not in wanted]:
        problems.append(f"{len(unexpected)} unexpected: {_shortened(unexpected)}")
    shapes = [(key, given[key].shape, wanted[key].shape) for key in wanted if key in given]
    if misshapen := [f"{key} {tuple(theirs)}, not {tuple(ours)}" for key, theirs, ours in shapes if theirs != ours]:
        problems.append(f"{len(misshapen)} of another shape: {_shortened(misshapen)}")
    if problems:
        raise ValueError(
            f"{what} does not fit this {network}: {'; '.join(problems)}. Build the network that the weights were "
            "trained in, or give weights of this one"
        )


def _shortened(names: Iterable[str], *, limit: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
