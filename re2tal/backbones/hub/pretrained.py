"""Models of the transformers library: random, from the hub, or from a local folder. Their own code is never run.

name or folder -> config.json: the right kind and size? -> safetensors only -> every parameter found? -> model
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from re2tal.backbones.base import BackboneConfig
from re2tal.backbones.hub.tiling import ClipEncoder, ClipwiseBackbone
from re2tal.backbones.swin3d.network import DropPath
from re2tal.backbones.weights import WEIGHTS_SUFFIXES, KeyLayout, is_weights_file, load_state, read_checkpoint
from re2tal.strict_json import read_json

Model = TypeVar("Model", bound=PreTrainedModel)

# How `from_pretrained` is called: nothing is unpickled or run, and what does not fit is left to `check_complete`.
SAFELY: dict[str, Any] = {
    "dtype": torch.float32,
    "use_safetensors": True,
    "weights_only": True,
    "trust_remote_code": False,
    "ignore_mismatched_sizes": True,
    "output_loading_info": True,
}

# A size that a CPU trains in seconds, for tests and first tries. Every family adds its patches and clips.
NANO = {"hidden_size": 48, "num_attention_heads": 2, "num_hidden_layers": 4}

# Fields that differ between the sizes of a family; each family has some of them.
SIZE_FIELDS = ("hidden_size", "num_hidden_layers", "num_spatial_layers", "num_temporal_layers", "num_attention_heads")


# Files that hold the state of one of our backbones.
OURS = KeyLayout(
    "re2tal",
    anchor=r"encoder\.model\..+",
    # Older files lack VideoMAE's sinusoid, and a network with adapters starts from a file without them.
    optional=(
        r"encoder\.model\.videomae\.embeddings\.position_embeddings",
        r"encoder\.model\.videomae\.encoder\.layer\.\d+\.adapter\..*",
    ),
)


def load_model(
    model_class: type[Model],
    config: PreTrainedConfig,
    *,
    weights: str | None,
    kinds: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> Model:
    """`model_class` with random weights and the sizes of `config`, or with the weights of a hub name or a local folder.

    Number of frames, picture size and the like come with the weights; width and depth must be those of `config`.
    `kinds` are the model types that the weights' config.json may name. Entries whose names begin with one of `optional`
    may be missing from the weights. Raises ValueError, with a remedy, for anything else. A single file is loaded later,
    by `clipwise`. On the meta device only the config.json is read.
    """
    if weights is None or weights_file(weights) is not None:
        return model_class(config)
    check_folder(weights)
    with readable(weights):
        _check_kind(type(config).get_config_dict(weights)[0], weights, kinds=kinds)
        found = type(config).from_pretrained(weights)
        _check_size(found, config, weights)
        # Who only asks whether it fits wants no gigabytes fetched.
        if torch.get_default_device().type == "meta":
            return model_class(found)
        model, report = cast(Any, model_class).from_pretrained(
            weights,
            config=found,
            **SAFELY,
        )
    check_complete(report, weights, network=model_class.__name__, optional=optional)
    return model


def read_config(weights: str) -> dict[str, Any]:
    """The config.json of a folder or a hub name. Raises ValueError, with a remedy, where it cannot be read."""
    check_folder(weights)
    with readable(weights):
        return PreTrainedConfig.get_config_dict(weights)[0]


@contextmanager
def readable(weights: str) -> Iterator[None]:
    """Turns the library's errors for unreachable or damaged weights into a ValueError with a remedy."""
    try:
        yield
    except OSError as error:
        if Path(weights).is_dir():
            raise ValueError(f"cannot read {weights!r}: {_first_line(error).rstrip('.')}; fetch it again") from error
        raise ValueError(
            f"cannot read {weights!r} from the model hub or its cache: {_first_line(error)} Without a network, fetch "
            f"it where there is one (`hf download {weights} --local-dir FOLDER`) and give that folder instead"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"the weights in {weights!r} are damaged ({error}); fetch them again") from error
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # a config.json of other types and values can make the library stumble anywhere
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"the config.json of {weights!r} describes no model that the installed transformers library can build "
            f"({what}); fetch it again, or correct it"
        ) from error


def check_folder(weights: str) -> None:
    """ValueError for a folder without a config or with incomplete safetensors, and for an impossible hub name."""
    folder = Path(weights)
    if folder.is_file():
        raise ValueError(f"{weights!r} is a file of no kind that is read; give one of {', '.join(WEIGHTS_SUFFIXES)}")
    if not folder.is_dir():
        if folder.is_absolute() or weights.count("/") > 1 or weights.startswith((".", "~")):
            raise ValueError(
                f"{weights!r} is neither a file, a folder nor a hub name; give OWNER/NAME or an existing path"
            )
        return
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; give a folder written by save_pretrained")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds no weights in safetensors files (pickled ones, *.bin and *.pth, are never read); fetch "
            "the safetensors version, or where you trust the file, load it with transformers and call save_pretrained"
        )
    for index in folder.glob("*.safetensors.index.json"):
        content = read_json(index)
        if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
            raise ValueError(f"{index} has no weight_map, which names the files of all entries; fetch it again")
        shards = {str(shard) for shard in content["weight_map"].values()}
        if absent := sorted(shard for shard in shards if not (folder / shard).is_file()):
            raise ValueError(f"{index} lists {', '.join(absent)}, which the folder lacks; fetch the weights again")


def _check_kind(found: dict, weights: str, *, kinds: tuple[str, ...]) -> None:
    kind = found.get("model_type")
    if kind not in kinds:
        remote = "; it also asks to run code that it brings, which is never done" if "auto_map" in found else ""
        raise ValueError(
            f"{weights!r} holds a model of type {kind!r}, this backbone is {' or '.join(map(repr, kinds))}{remote}; "
            "choose another backbone.name or other weights"
        )


def _check_size(found: PreTrainedConfig, wanted: PreTrainedConfig, weights: str) -> None:
    pairs = {name: (getattr(found, name), getattr(wanted, name)) for name in SIZE_FIELDS if hasattr(wanted, name)}
    wrong = [f"{name} {theirs}, not {ours}" for name, (theirs, ours) in pairs.items() if theirs != ours]
    if wrong:
        raise ValueError(f"{weights!r} is another size of this family ({', '.join(wrong)}); choose its backbone.name")


def check_complete(report: dict, weights: str, *, network: str, optional: tuple[str, ...]) -> None:
    """ValueError if the library's loading `report` names entries that are missing or of another shape.

    Entries that begin with one of `optional` are let pass.
    """
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(optional))
    misshapen = sorted(str(entry[0]) for entry in report["mismatched_keys"] if not entry[0].startswith(optional))
    if missing or misshapen:
        raise ValueError(
            f"{weights!r} does not fill {network}: {len(missing)} missing {missing[:6]}, {len(misshapen)} of another "
            f"shape {misshapen[:6]}, {len(report['unexpected_keys'])} unexpected "
            f"{sorted(report['unexpected_keys'])[:6]}; give weights of this architecture"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def clipwise(encoder: ClipEncoder, config: BackboneConfig, *, layouts: tuple[KeyLayout, ...] = ()) -> ClipwiseBackbone:
    """The backbone around `encoder`. If `config.weights` is a file, ours or in one of `layouts`, it is loaded."""
    backbone = ClipwiseBackbone(encoder)
    if (file := weights_file(config.weights)) is not None:
        try:
            checkpoint = read_checkpoint(file)
            _check_clips(checkpoint.metadata, file, ours=encoder.clip_frames)
            load_state(backbone, checkpoint.tensors, layouts=(OURS, *layouts), what=f"{file}")
        except ValueError as error:
            if not _is_of_the_library(file.parent):
                raise
            raise ValueError(f"{error}. Or give {file.parent}, the whole folder of this model") from error
    return backbone


def _check_clips(metadata: Mapping[str, str], file: Path, *, ours: int) -> None:
    """ValueError where the header of a file tells of clips of another length: no name or shape of a tensor need."""
    if (theirs := metadata.get("clip_frames", f"{ours}")) != f"{ours}":
        raise ValueError(
            f"{file} holds a network that was trained on clips of {theirs} frames, and from a file it is built for "
            f"clips of {ours}; give the folder or hub name that its training started from, which says how long clips "
            "are, and its run as start_from; or a folder of it (re2tal export --run RUN --to transformers --out FOLDER)"
        )


def _is_of_the_library(folder: Path) -> bool:
    """Whether save_pretrained wrote it."""
    config = folder / "config.json"
    content = read_json(config) if config.is_file() else None
    return isinstance(content, dict) and "model_type" in content


def weights_file(weights: str | None) -> Path | None:
    """The path if `weights` names a single file, and no folder or hub name. It need not exist."""
    return Path(weights) if weights is not None and is_weights_file(weights) else None


def add_drop_path(blocks: Iterable[nn.Module], rate: float, *, after: tuple[str, ...]) -> None:
    """Adds drop-path after the named last submodules of every block's branches, with rates from 0 to `rate`.

    Blocks of the library have none, or one whose rate was fixed by their configuration. No parameter is renamed.
    """
    if rate == 0:
        return
    blocks = list(blocks)
    for block, block_rate in zip(blocks, torch.linspace(0, rate, len(blocks), device="cpu").tolist(), strict=True):
        for path in after:
            block.set_submodule(path, nn.Sequential(block.get_submodule(path), DropPath(block_rate)))
