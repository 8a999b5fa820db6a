"""model.safetensors: the trained model, for inference.

Float32 weights and buffers by name. The header has the class names, the wiring of a rewired network at the end of
training, the frames of a clip of a backbone that cuts video into clips, and a description of the stored features, if it
was trained on any.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from re2tal.files import atomic_file
from re2tal.rewire import same_wiring, wiring_of

FORMAT = "re2tal-model"


@dataclass(frozen=True)
class ModelFile:
    """A trained model on the disk, read."""

    path: Path
    weights: dict[str, Tensor]
    classes: tuple[str, ...]
    wiring: Mapping[str, Any] | None = None
    """`wiring_of` the network that was trained; None for a plain one."""
    features: Mapping[str, Any] | None = None
    """The stored features of its training, as `stored_features.describe` gives them; None for videos."""
    clip_frames: int | None = None
    """`clip_frames_of` the network that was trained; None for one without clips, and in older files."""

    @property
    def facts(self) -> dict[str, Any]:
        """What `write_model` takes beside the weights."""
        return {name: getattr(self, name) for name in ("classes", "wiring", "features", "clip_frames")}

    def load_into(self, detector: nn.Module, *, classes: Sequence[str]) -> None:
        """Gives a detector or recognizer, built for `classes` these weights. ValueError where they do not fit."""
        if tuple(classes) != self.classes:
            raise ValueError(
                f"{self.path} was trained for {len(self.classes)} classes {_brief(self.classes)}, the detector is for "
                f"{len(classes)} {_brief(classes)}; build it with the classes of the file, or train with this data"
            )
        if self.wiring is not None and not same_wiring(wiring_of(detector), self.wiring):
            raise ValueError(
                f"{self.path} was trained rewired with {self.wiring}, the detector is built with "
                f"{wiring_of(detector)}, which is another network; use the config.json of the run that wrote it"
            )
        self.check_clips(detector)
        own = {name: tuple(value.shape) for name, value in detector.state_dict().items()}
        saved = {name: tuple(value.shape) for name, value in self.weights.items()}
        if own != saved:
            odd = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
            first = odd[0]
            raise ValueError(
                f"{self.path} does not fit the detector: {len(odd)} tensors differ, such as {first}: "
                f"{saved.get(first)} in the file, {own.get(first)} in the detector; use the config.json of the run "
                "that wrote it"
            )
        detector.load_state_dict(self.weights)

    def check_clips(self, network: nn.Module) -> None:
        """ValueError where the backbone takes clips of another length: shapes do not tell, and features differ."""
        if self.clip_frames not in (None, ours := clip_frames_of(network)):
            raise ValueError(
                f"{self.path} was trained on clips of {self.clip_frames} frames, and the backbone here takes {ours}; "
                "give backbone.weights the folder or hub name that its training had, which says how long clips are"
            )


def facts_of(model: Any, *, features: Mapping[str, Any] | None) -> dict[str, Any]:
    """`ModelFile.facts` of a network that has its `classes`; `features` are those that it was trained on."""
    clip_frames = clip_frames_of(model)
    return {"classes": model.classes, "wiring": wiring_of(model), "features": features, "clip_frames": clip_frames}


def clip_frames_of(network: nn.Module) -> int | None:
    """How many frames a clip has, where the backbone inside cuts video into clips."""
    modules: Iterable[Any] = network.modules()
    return next((one.clip_frames for one in modules if hasattr(one, "clip_frames")), None)


def clips_in_header(backbone: nn.Module) -> dict[str, str]:
    """What the header of a weights file says of `clip_frames_of` its backbone."""
    clip_frames = clip_frames_of(backbone)
    return {} if clip_frames is None else {"clip_frames": f"{clip_frames}"}


def write_model(
    path: Path,
    weights: Mapping[str, Tensor],
    *,
    classes: Sequence[str],
    wiring: Mapping[str, Any] | None = None,
    features: Mapping[str, Any] | None = None,
    clip_frames: int | None = None,
) -> None:
    """Writes the file whole or not at all; `wiring` is `wiring_of` the network, the others are as in `ModelFile`."""
    header = {"format": FORMAT, "classes": json.dumps(list(classes))}
    header |= {"wiring": json.dumps(wiring), "features": json.dumps(features)}
    header |= {} if clip_frames is None else {"clip_frames": f"{clip_frames}"}
    write_tensors(path, weights, metadata=header)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file whole or not at all."""
    with atomic_file(path) as file:
        file.write(_with_sorted_header(save(dict(tensors), metadata=dict(metadata))))


def _with_sorted_header(content: bytes) -> bytes:
    """The same file with its metadata in alphabetical order.

    The library writes them in the order of a hash map, another one each time: equal models would differ in bytes.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants tensors aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def read_model(path: Path) -> ModelFile:
    """Reads what `write_model` wrote, to the CPU. Raises FileNotFoundError, and ValueError for any other file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; train first, or name the model.safetensors of a run folder")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); copy it again, or train again") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a trained re2tal model; a file of backbone weights goes to backbone.weights")
    said = {name: json.loads(metadata.get(name, "null")) for name in ("wiring", "features", "clip_frames")}
    return ModelFile(path, weights, tuple(json.loads(metadata["classes"])), **said)


def _brief(classes: Sequence[str]) -> str:
    return f"({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"
