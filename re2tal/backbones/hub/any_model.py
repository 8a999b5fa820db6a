"""Loads any vision or video model of the transformers library, to show which parts of it can be rewired.

The model is no backbone and needs no row in BACKBONES. Its blocks are taken apart by what they do in one run on an
example, whose shape comes from its config. Code that comes with a model is never run.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from re2tal.backbones.hub.pretrained import SAFELY, check_complete, check_folder, readable


def load_any_model(name: str) -> PreTrainedModel:
    """The model of a local folder or a hub name, in float32 and training mode, from safetensors only.

    Raises ValueError, with a remedy, if it cannot be read, has no safetensors, needs its own code, or does not take
    `pixel_values` first.
    """
    check_folder(name)
    with readable(name):
        found = PreTrainedConfig.get_config_dict(name)[0]
        kind = str(found.get("model_type"))
        model_class = _model_class(kind, name, brings_code="auto_map" in found)
        model, report = model_class.from_pretrained(
            name,
            config=CONFIG_MAPPING[kind].from_pretrained(name),
            **SAFELY,
        )
    check_complete(report, name, network=model_class.__name__, optional=("pooler",))
    return model.train()


def _model_class(kind: str, name: str, *, brings_code: bool) -> Any:
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_MAPPING:
        code = "; it asks to run code that it brings, which is never done" if brings_code else ""
        raise ValueError(
            f"{name!r} holds a model of type {kind!r}, which the installed transformers library does not know{code}; "
            "give a model of the library, or rewire yours with re2tal.rewire.rewire(model, example=...)"
        )
    classes = MODEL_MAPPING[CONFIG_MAPPING[kind]]
    model_class: Any = classes if isinstance(classes, type) else classes[0]
    first = list(inspect.signature(model_class.forward).parameters)[1]
    if first != "pixel_values":
        raise ValueError(
            f"{name!r} holds a {model_class.__name__}, which takes {first} first and not pixel_values; give a model of "
            "pictures or video, or call re2tal.rewire.rewire(model, example=...) with inputs of your own"
        )
    return model_class


def example_shape(model: PreTrainedModel, *, num_frames: int | None, size: tuple[int, int] | None) -> tuple[int, ...]:
    """(1, num_frames, 3, H, W) for a model of video, (1, 3, H, W) for one of pictures, as its config says.

    `num_frames` and `size` (rows, columns) override the config. A config without a size means 224.
    Raises ValueError for `num_frames` of a model of pictures.
    """
    config = model.config
    native = getattr(config, "image_size", None) or 224
    rows, columns = size or ((native, native) if isinstance(native, int) else native)
    picture = (getattr(config, "num_channels", 3), rows, columns)
    native_frames = getattr(config, "num_frames", None)
    if native_frames is None and num_frames is not None:
        raise ValueError(f"frames is {num_frames}, but a {type(model).__name__} takes single pictures; leave it out")
    return (1, *picture) if native_frames is None else (1, num_frames or native_frames, *picture)
