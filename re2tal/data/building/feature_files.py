"""One video's features as other programs store them, read as an array. Nothing is ever unpickled.

One HDF5 file may hold all videos, each under its name.

.npy              an array                              .csv         a step per line, with or without a header
.npz .h5 .hdf5    one or more arrays, by name           .pt .pth     a tensor, or a dictionary of tensors
"""

from __future__ import annotations

import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_BYTES = 1 << 32
"""Of one video's features in float32: 16 hours at 7.5 steps a second in 2048 channels fit."""


@dataclass(frozen=True, slots=True)
class FeatureFile:
    """Where the features of a video are."""

    path: Path
    entry: str = ""
    """Its dataset, or group of datasets, in an HDF5 file of several videos."""

    @property
    def stem(self) -> str:
        """What names the video."""
        return self.entry or self.path.stem

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.path.name}/{self.entry}" if self.entry else self.path.name

    def load(self, *, key: str | None = None) -> np.ndarray:
        """As `load_array`."""
        return load_array(self.path, key=key, entry=self.entry)


def list_files(place: Path, *, suffix: str | None = None) -> tuple[FeatureFile, ...]:
    """The files in a folder whose format can be read (those that end in `suffix`, if given), or the entries of an HDF5
    file. ValueError where `place` is neither."""
    if place.is_dir():
        wanted = (suffix,) if suffix else FEATURE_SUFFIXES
        inside = (one for one in sorted(place.iterdir()) if one.suffix.lower() in wanted)
        return tuple(FeatureFile(one) for one in inside if not one.name.startswith("._") and os.path.isfile(one))
    if not place.is_file() or place.suffix.lower() not in HDF5_SUFFIXES:
        raise ValueError(f"{place} is not a folder; give the folder that holds the files of features, or one .h5 file")
    try:
        import h5py

        with h5py.File(place, "r") as file:
            return tuple(FeatureFile(place, name) for name in _hard_links(h5py, file))
    except ImportError:
        raise ValueError(f"{place.name} needs h5py to be read: pip install 're2tal[h5]'") from None
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{place} is no sound HDF5 file ({str(error)[:120]})") from None


def load_array(path: Path, *, key: str | None = None, entry: str = "") -> np.ndarray:
    """A two-dimensional array of floats, mapped from the disk where the format allows it.

    `key` names one of several arrays, `entry` a video in an HDF5 file of several. Axes of length 1 are dropped where
    there are more than two. Raises ValueError, naming the file, for anything else.
    """
    shown = FeatureFile(path, entry).name
    try:
        values = _h5(path, key, entry) if entry else _READERS[path.suffix.lower()](path, key)
    except _Unfit as error:
        may_hold_others = isinstance(error, _TooLarge) and key is None and path.suffix.lower() not in (".npy", ".csv")
        hint = "; where it holds several arrays, name one with --key" if may_hold_others else ""
        raise ValueError(f"{shown} {error}{hint}") from None
    except ImportError:
        raise ValueError(f"{shown} needs h5py to be read: pip install 're2tal[h5]'") from None
    except Exception as error:  # one file, whatever it does to its reader, never ends a job
        what = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        if re.search(r"pickle|weights.only", what, re.IGNORECASE):  # their advice is to run what the file says
            what = "what it holds is not numbers alone"
        raise ValueError(f"{shown} is no sound {path.suffix} file of numbers ({what})") from None
    values = _two_axes(values)
    if values.ndim != 2 or values.dtype.kind != "f":
        raise ValueError(
            f"{shown} holds {values.dtype} of shape {values.shape}; wanted floats of shape (T, C) or (C, T)"
        )
    return values


class _Unfit(Exception):
    """What is wrong with a file that can be read; the message follows its name."""


class _TooLarge(_Unfit):
    """More than any video's features."""


def _npy(path: Path, key: str | None) -> np.ndarray:
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(values, np.ndarray):
        raise _Unfit("is an archive of arrays, not one: call it .npz")
    if isinstance(values, np.memmap) and values.offset + values.nbytes < path.stat().st_size:
        raise _Unfit(f"goes on behind its array of shape {values.shape}; write all of it as one array")
    return values


def _npz(path: Path, key: str | None) -> np.ndarray:
    _check_unpacked(path, only=key)
    with np.load(path, allow_pickle=False) as archive:
        if isinstance(archive, np.ndarray):
            raise _Unfit("is one array, not an archive: call it .npy")
        return _chosen(list(archive.files), archive.__getitem__, key)


def _pt(path: Path, key: str | None) -> np.ndarray:
    if zipfile.is_zipfile(path):  # files of older versions are none
        _check_unpacked(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(loaded, Mapping):
        tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
        return _chosen(list(tensors), lambda name: _from_torch(tensors[name]), key)
    if not isinstance(loaded, Tensor):
        raise _Unfit(f"holds a {type(loaded).__name__}; wanted a tensor, or a dictionary of tensors")
    return _from_torch(loaded)


def _from_torch(tensor: Tensor) -> np.ndarray:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise _Unfit("holds a sparse or quantized tensor; store it dense")
    _check_size(4 * tensor.numel())  # a view may claim more than the file holds
    values = tensor.detach()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def _h5(path: Path, key: str | None, entry: str = "") -> np.ndarray:
    import h5py

    with h5py.File(path, "r") as file:
        inside = file[entry] if entry else file
        if isinstance(inside, h5py.Dataset):
            return _from_h5(inside)
        names: list[str] = []
        _collect(h5py, inside, "", names)
        return _chosen(names, lambda name: _from_h5(inside[name]), key)


def _hard_links(h5py: Any, group: Any) -> list[str]:
    """Names in a group that are no links: these may lead to other files."""
    return [name for name in group if isinstance(group.get(name, getlink=True), h5py.HardLink)]


def _collect(h5py: Any, group: Any, prefix: str, names: list[str]) -> None:
    """Names of the datasets in a group, and in groups in it."""
    for name in _hard_links(h5py, group):
        inside = group[name]
        if isinstance(inside, h5py.Dataset):
            names.append(prefix + name)
        # Groups may hold each other in a circle.
        elif prefix.count("/") < 4:
            _collect(h5py, inside, f"{prefix}{name}/", names)


def _from_h5(dataset: Any) -> np.ndarray:
    if dataset.is_virtual or dataset.external:
        raise _Unfit(f"keeps {dataset.name} in other files; store it in this one")
    _check_size(4 * math.prod(dataset.shape or ()))
    return np.asarray(dataset[()])


def _csv(path: Path, key: str | None) -> np.ndarray:
    _check_size(path.stat().st_size)
    with path.open(encoding="utf-8-sig") as file:
        line = file.readline(1 << 22).strip("\r\n")
    # A file without any of them has one column.
    delimiter = max(",;\t ", key=line.count)
    cells = [cell.strip().strip('"') for cell in line.split(delimiter)]
    numbers = [_number(cell) for cell in cells]
    counts_up = len(numbers) > 1 and numbers == [*range(len(numbers))]  # as pandas calls columns without names
    has_header = counts_up or any(number is None for number in numbers)
    if has_header and not cells[0]:
        raise _Unfit("begins with a column without a name, as row numbers are written; write it without them")
    if has_header and re.sub(r"[^a-z]", "", cells[0].lower()) in _NO_FEATURES:
        raise _Unfit(f"begins with a column {cells[0]!r}, which is no feature; write it without this column")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty file is told by its shape
        values = np.loadtxt(
            path,
            delimiter=None if delimiter == " " else delimiter,
            skiprows=int(has_header),
            comments=None,
            ndmin=2,
            quotechar='"',
            encoding="utf-8-sig",
        )
    if not len(values):
        raise _Unfit("has no row of numbers with a point before their decimals")
    if values.shape[1] > 1 and _counts(values[:, 0]):
        raise _Unfit("begins with a column that counts rows, frames or seconds; write it without this column")
    if len(values) > 1 and _counts(values[0]):
        raise _Unfit("begins with a row that counts columns, frames or seconds; write it without this row")
    return values


_NO_FEATURES = frozenset(
    {"frame", "frames", "framenumber", "time", "times", "timestamp", "seconds", "index", "id", "step"}
)


def _counts(numbers: np.ndarray) -> bool:
    """Whether these are numbers from 0 or 1, or rise by the same step, as times do: features do not."""
    steps = np.diff(numbers)
    if not len(steps):
        return False
    # A counter, or times: they rise evenly, which the output of a network hardly does at each step.
    is_whole = numbers[0] in (0, 1) and (steps == 1).all()
    return bool(is_whole or (len(steps) > 2 and steps.min() > 0 and np.ptp(steps) <= 0.05 * steps.mean()))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


_READERS: dict[str, Callable[[Path, str | None], np.ndarray]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".pt": _pt,
    ".pth": _pt,
    ".h5": _h5,
    ".hdf5": _h5,
    ".csv": _csv,
}
FEATURE_SUFFIXES = tuple(_READERS)
HDF5_SUFFIXES = (".h5", ".hdf5")


def _chosen(names: Sequence[str], load: Callable[[str], np.ndarray], key: str | None) -> np.ndarray:
    """The array called `key`; without one, the only array that could be features."""
    if key is not None:
        if key not in names:
            raise _Unfit(f"has no array {key!r}; it has {_listed(names)}")
        return load(key)
    arrays: dict[str, np.ndarray] = {}
    # Each is loaded, and nobody means one of hundreds without naming it.
    for name in names[:64]:
        try:
            arrays[name] = load(name)
            _check_size(sum(one.nbytes for one in arrays.values()))
        except _TooLarge:  # it may be the one that is meant
            raise
        except Exception:  # what else lies in the file need not be an array
            if len(names) == 1:
                raise
    fit = [name for name, one in arrays.items() if _two_axes(one).ndim == 2 and one.dtype.kind == "f"]
    if len(fit) != 1:
        what = f"{len(fit)} arrays that could be features ({_listed(fit)}): name one with --key"
        raise _Unfit(f"holds {what}" if fit else f"holds no array of floats with two axes; it has {_listed(names)}")
    return arrays[fit[0]]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"


def _two_axes(values: np.ndarray) -> np.ndarray:
    return values.reshape([length for length in values.shape if length != 1]) if values.ndim > 2 else values


def _check_unpacked(path: Path, *, only: str | None = None) -> None:
    """Before anything is unpacked: two kilobytes could unfold to gigabytes. `only`: the array that will be."""
    with zipfile.ZipFile(path) as archive:
        inside = [one for one in archive.infolist() if only is None or one.filename == f"{only}.npy"]
        _check_size(max((one.file_size for one in inside), default=0))


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_BYTES:
        raise _TooLarge(f"claims {num_bytes} bytes of numbers, more than the limit of {MAX_BYTES}")
