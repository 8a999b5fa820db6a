"""Whole detectors and backbones from other code bases, and back to them.

    OpenTAD    backbone.model.backbone.*   projection.*  neck.*  rpn_head.*  (roi_head.*)
    ours       backbone.*                  localizer.*

Detectors on stored features have no backbone: OpenTAD's, and those of ActionFormer's release (localizer.variant).

A rewired network has the names of the plain one, so its weights go to every layout of its family.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from re2tal.backbones import WIRING_KEY, build_backbone, is_of_the_library, stored, take_parts_of
from re2tal.backbones.base import BackboneConfig, VideoBackbone
from re2tal.backbones.hub.tiling import ClipwiseBackbone
from re2tal.backbones.slowfast import layouts as slowfast_layouts
from re2tal.backbones.slowfast import network as slowfast
from re2tal.backbones.swin3d import layouts as swin3d_layouts
from re2tal.backbones.swin3d import network as swin3d
from re2tal.backbones.swin3d.shifted_windows import relative_position_index
from re2tal.backbones.weights import KeyLayout, LoadReport, export_state, load_state, read_checkpoint
from re2tal.config import RunConfig, build_detector
from re2tal.detector import TemporalActionDetector
from re2tal.localizers.pyramid.actionformer import Variant
from re2tal.localizers.pyramid.localizer import PyramidLocalizer
from re2tal.localizers.vsgn.localizer import VSGN
from re2tal.localizers.weights import export_weights, import_weights, public_name, public_prefixes
from re2tal.rewire import unrewire, wiring_of

VIDEO_PREFIX = "backbone.model.backbone."
"""Under which OpenTAD's detectors keep the video network."""


@dataclass(frozen=True)
class ImportReport:
    """Layout of an imported file, and its used and unused entries."""

    path: Path
    taken_from: str
    """Entry of the file, such as "state_dict_ema"; empty for its top."""
    layout: str
    """Of the backbone."""
    prefix: str
    """Before the backbone's entries."""
    num_backbone: int
    num_localizer: int
    """Tensors that were loaded; 0 where the backbone alone was wanted."""
    ignored: tuple[str, ...]
    """Their names."""
    kept: tuple[str, ...] = ()
    """Our names of what the file does not hold and need not: it stays as it is built."""

    def __str__(self) -> str:
        place = self.taken_from or "top"
        under = f" under {self.prefix}" if self.prefix else ""
        part = "backbone" if self.num_backbone else "localizer"
        lines = [f"{self.path}: weights of its {place}, {part} in the layout of {self.layout}{under}"]
        counts = {"backbone": self.num_backbone, "localizer": self.num_localizer}
        loaded = " and ".join(f"{number} tensors of the {name}" for name, number in counts.items() if number)
        lines.append(f"loaded {loaded}; {len(self.ignored)} have no use")
        lines += [f"  unused: {name}" for name in self.ignored]
        return "\n".join([*lines, *(f"  not in the file, as built: {name}" for name in self.kept)])


def key_layouts(name: str) -> tuple[KeyLayout, ...]:
    """The layouts that the backbone of this name is read from and written to."""
    if name in swin3d.SIZES:
        return swin3d_layouts.KEY_LAYOUTS
    if name in slowfast.SIZES:
        return slowfast_layouts.KEY_LAYOUTS
    from re2tal.backbones.hub.internvideo2 import SIZES, original
    from re2tal.backbones.hub.pretrained import OURS  # imports transformers, which takes seconds
    from re2tal.backbones.hub.videomae_layouts import MMACTION, ORIGINAL
    from re2tal.backbones.hub.vjepa2_layouts import ORIGINAL as VJEPA2

    if name in SIZES:
        return OURS, original(SIZES[name])
    families = {"videomae": (MMACTION, ORIGINAL), "vjepa2": (VJEPA2,)}
    return (OURS, *families.get(name.partition("_")[0], ()))


def import_backbone(path: Path, *, name: str) -> tuple[VideoBackbone, ImportReport]:
    """The backbone of that name, plain, with the weights of a file in any layout that its family reads.

    Of a family of the transformers library, `path` may be a folder or a hub name. Raises FileNotFoundError, and
    ValueError that names the file and every missing, unexpected or misshapen entry.
    """
    if is_of_the_library(name, str(path)):
        backbone = build_backbone(BackboneConfig(name=name, weights=str(path), rewired=False))
        return backbone, ImportReport(path, "", "transformers", "", len(backbone.state_dict()), 0, ())
    checkpoint = read_checkpoint(path)
    # Some families take their last norm from the file, so the file is part of the building.
    backbone = build_backbone(BackboneConfig(name=name, weights=str(path), rewired=False))
    loaded = load_state(backbone, checkpoint.tensors, layouts=key_layouts(name), what=f"{path}")
    return backbone, ImportReport(
        path, checkpoint.taken_from, loaded.layout, loaded.prefix, len(loaded.loaded), 0, loaded.ignored, loaded.kept
    )


def import_detector(
    path: Path, config: RunConfig, *, classes: Sequence[str]
) -> tuple[TemporalActionDetector, ImportReport]:
    """The detector that `config` describes, with the weights that OpenTAD trained for `classes`, in their order.

    On stored features it may be one of the code base that `localizer.variant` names, such as ActionFormer's release.
    Raises FileNotFoundError, and ValueError that names the file and what of it is missing, unexpected or misshapen.
    """
    checkpoint = read_checkpoint(path)
    detector = build_detector(replace(config, backbone=replace(config.backbone, weights=None)), classes)
    on_features = config.backbone.name == stored.NAME
    localizer = _localizer_of(detector, any_variant=on_features)
    layout: Variant = getattr(localizer.config, "variant", "opentad") if on_features else "opentad"
    # The prefix of torch's data-parallel wrapper, if every name has it.
    outer = "module." if all(key.startswith("module.") for key in checkpoint.tensors) else ""
    state = {key.removeprefix(outer): value for key, value in checkpoint.tensors.items()}
    theirs = {key for key in state if key.startswith(public_prefixes(localizer, layout))}
    _check_detector(state, theirs, localizer, path, layout=layout)
    if on_features:
        loaded = _without_backbone(checkpoint.tensors, path, layout=layout)
    else:
        loaded = _load_backbone(detector.backbone, checkpoint.tensors, config.backbone, path)
    try:
        localizer.load_state_dict(import_weights(state, localizer=localizer, layout=layout))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    ignored = tuple(key for key in loaded.ignored if key.removeprefix(outer) not in theirs)
    return detector, ImportReport(
        path, checkpoint.taken_from, loaded.layout, loaded.prefix, len(loaded.loaded), len(theirs), ignored
    )


def _without_backbone(tensors: Mapping[str, Tensor], path: Path, *, layout: str) -> LoadReport:
    """For a detector on stored features."""
    if any(VIDEO_PREFIX in name for name in tensors):
        raise ValueError(
            f"{path} holds a video network too (under {VIDEO_PREFIX}), and this run takes stored features; give a "
            "recipe on videos, with the backbone that the file was trained with"
        )
    return LoadReport(layout, "", (), tuple(tensors))


def _load_backbone(
    backbone: VideoBackbone, tensors: Mapping[str, Tensor], config: BackboneConfig, path: Path
) -> LoadReport:
    """The backbone of a whole detector: as it was trained, with adapters or without."""
    if config.adapter == "none" and any(re.search(r"blocks\.\d+\.adapter\.", name) for name in tensors):
        raise ValueError(
            f"{path} holds AdaTAD's adapters, and backbone.adapter is 'none'; set it to 'temporal', and "
            "backbone.adapter_blocks where only some blocks have one"
        )
    take_parts_of(backbone, tensors)
    loaded = load_state(backbone, tensors, layouts=key_layouts(config.name), what=f"{path}")
    if lacking := [name for name in loaded.kept if ".adapter." in name]:
        raise ValueError(
            f"{path} lacks {len(lacking)} tensors of the adapters that this run has ({', '.join(lacking[:3])}, ...), "
            "without which it detects something else; set backbone.adapter or adapter_blocks as it was trained"
        )
    _check_rewiring(loaded.layout, config, path)
    return loaded


def export_backbone(backbone: VideoBackbone, *, name: str, to: str, prefix: str = "") -> dict[str, Tensor]:
    """The weights of the backbone called `name` as the code base `to` names them, its constant tables included.

    `to` is the beginning of a layout's name: opentad, mmaction2, torchvision, pytorchvideo, original. Raises ValueError
    for one that the family has not.
    """
    layout = _find_layout(name, to)
    _check_layout_holds(backbone, layout.name)
    state = export_state(backbone, layout=layout)
    if name in swin3d.SIZES:
        state |= _position_indices(backbone, layout)
    return {prefix + key: value for key, value in state.items()}


def save_for_the_library(
    backbone: VideoBackbone, folder: Path, *, name: str, wiring: Mapping[str, Any] | None = None
) -> None:
    """Writes a folder from which the transformers library, and `backbone.weights`, take the backbone called `name`.

    A rewired one is put back first; config.json says how it was rewired, `wiring`. Raises ValueError for a family that
    is not of that library.
    """
    if not isinstance(backbone, ClipwiseBackbone):
        raise ValueError(f"{name} is no model of the transformers library; its layouts: {_known(name)}")
    _check_layout_holds(backbone, "transformers")
    if wiring_of(backbone) is not None:
        unrewire(backbone)
    model, state = cast(Any, backbone.encoder).model, None
    setattr(model.config, WIRING_KEY, None if wiring is None else dict(wiring))
    if hasattr(backbone.encoder, "draws_its_positions"):  # as the library does
        state = {key: value for key, value in model.state_dict().items() if not key.endswith(".position_embeddings")}
    model.save_pretrained(folder, state_dict=state)


def _check_layout_holds(backbone: VideoBackbone, layout: str) -> None:
    """ValueError where a layout has no place for the adapters or the positions of a VideoMAE."""
    encoder: Any = getattr(backbone, "encoder", None)
    if layout.startswith(("mmaction2", "re2tal")) or not hasattr(encoder, "draws_its_positions"):
        return
    what = "adapters" if encoder.crosses_clips else "" if encoder.draws_its_positions() else "positions of its own"
    if what:
        raise ValueError(
            f"this VideoMAE has {what}, which the layout of {layout} has no place for; export to mmaction2, which has"
        )


def export_detector(detector: TemporalActionDetector, *, config: BackboneConfig, prefix: str = "") -> dict[str, Tensor]:
    """A detector, its backbone built from `config`, as OpenTAD names it: the inverse of `import_detector`."""
    # OpenTAD takes its plain networks from mmaction2.
    to = "opentad" if config.rewired and config.beta else "mmaction2"
    backbone = export_backbone(detector.backbone, name=config.name, to=to, prefix=VIDEO_PREFIX)
    state = backbone | export_weights(_localizer_of(detector), layout="opentad")
    return {prefix + key: value for key, value in state.items()}


def _localizer_of(detector: TemporalActionDetector, *, any_variant: bool = False) -> PyramidLocalizer | VSGN:
    localizer = cast(PyramidLocalizer | VSGN, detector.localizer)
    variant = getattr(localizer.config, "variant", "opentad")
    if variant != "opentad" and not any_variant:
        raise ValueError(f"localizer.variant is {variant!r}, and whole detectors are OpenTAD's; set it to 'opentad'")
    return localizer


def _check_detector(
    state: Mapping[str, Tensor], found: set[str], localizer: PyramidLocalizer | VSGN, path: Path, *, layout: Variant
) -> None:
    if not found:
        prefixes = ", ".join(public_prefixes(localizer, layout))
        raise ValueError(
            f"{path} holds no localizer (nothing under {prefixes}), so it is no whole detector; for a backbone alone "
            "name an output file that ends in .safetensors"
        )
    last = state.get(public_name("classifier.output.bias", localizer=localizer, layout=layout))
    if isinstance(localizer, PyramidLocalizer) and last is not None and last.numel() != len(localizer.classes):
        raise ValueError(
            f"{path} tells {last.numel()} classes apart, and {len(localizer.classes)} were given; name all classes of "
            "its training, one per line and in their order, or set localizer.class_agnostic as it was trained"
        )


def _check_rewiring(layout: str, config: BackboneConfig, path: Path) -> None:
    """The same weights compute one thing in a plain network and another in a rewired one; their names tell which."""
    trained_rewired = layout.startswith("OpenTAD")
    if not trained_rewired and config.rewired and config.beta == 0 and config.name not in slowfast.SIZES:
        return  # rewired, but the plain network all the same
    if trained_rewired and (config.unit, config.merge, config.segment, config.beta) != ("branch", "mean", None, 1):
        raise ValueError(
            f"{path} was trained with OpenTAD's rewiring, and backbone.unit, merge, segment and beta are "
            f"{config.unit}, {config.merge}, {config.segment} and {config.beta}; set them to branch, mean, None and 1"
        )
    if trained_rewired != config.rewired:
        kind = "rewired" if trained_rewired else "plain"
        raise ValueError(
            f"{path} was trained with a {kind} backbone ({layout} layout); set backbone.rewired to "
            f"{str(trained_rewired).lower()}"
        )


def _find_layout(name: str, to: str) -> KeyLayout:
    found = [layout for layout in key_layouts(name) if layout.name.lower().startswith(to.lower())]
    if not found:
        raise ValueError(f"{name} has no layout {to!r}; known (the beginning suffices): {_known(name)}")
    return found[0]


def _known(name: str) -> list[str]:
    ours = name in (*swin3d.SIZES, *slowfast.SIZES)
    return [layout.name for layout in key_layouts(name)] + ([] if ours else ["transformers"])


def _position_indices(backbone: nn.Module, layout: KeyLayout) -> dict[str, Tensor]:
    """The constant tables of a Video Swin, which other code bases keep in their checkpoints: row of the bias table for
    each pair of tokens, (tokens, tokens) int64."""
    names = layout.from_ours(list(backbone.state_dict()))
    tables: dict[str, Tensor] = {}
    for place, attention in backbone.named_modules():
        if isinstance(attention, swin3d.WindowAttention):
            theirs = names[f"{place}.relative_position_bias_table"].replace("bias_table", "index")
            tables[theirs] = torch.from_numpy(relative_position_index(attention.window, math.prod(attention.window)))
    return tables
