"""Stored features: to bytes and back, with every check, and at any place in time.

{id}.safetensors    one tensor "features", (C, T) float16 or float32, all finite
"""

from __future__ import annotations

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from re2tal.data.contract.feature_manifest import IndexedFeatures, StoredType
from re2tal.data.contract.members import read_content
from re2tal.data.contract.shards import FeatureSet
from re2tal.data.streaming.decode import DecodeError

DTYPES: dict[StoredType, torch.dtype] = {"float16": torch.float16, "float32": torch.float32}


def pack_features(values: Tensor, *, dtype: StoredType) -> bytes:
    """(C, T) float -> the file's bytes; ValueError for values that are not finite, or do not fit the type."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{int((~torch.isfinite(values)).sum())} of its {values.numel()} features are not finite")
    stored = values.to(DTYPES[dtype])
    # Again after the cast: float16 ends at 65504.
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(
            f"a feature of {float(values.abs().max()):g} does not fit into {dtype}; store all with --dtype float32"
        )
    return save({"features": stored.contiguous()})


def unpack_features(content: bytes, *, channels: int, num_steps: int, dtype: StoredType) -> Tensor:
    """The file's bytes -> (C, T); ValueError where it is not what the manifest and the index say."""
    try:
        # safetensors: numbers and their shapes, and nothing that could be executed.
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(f"is no sound safetensors file ({error})") from None
    if list(tensors) != ["features"]:
        raise ValueError(f'holds tensors {sorted(tensors)[:4]}, not one called "features"')
    values = tensors["features"]
    if values.shape != (channels, num_steps) or values.dtype != DTYPES[dtype]:
        raise ValueError(
            f"holds {tuple(values.shape)} of {values.dtype}, manifest and index say {(channels, num_steps)} of {dtype}"
        )
    if not bool(torch.isfinite(values).all()):
        raise ValueError("holds features that are not finite")
    return values


def read_features(features: FeatureSet, video: IndexedFeatures) -> Tensor:
    """A video's features out of their shard, (C, T) float32.

    Raises:
        DecodeError: if they are not what the index and the manifest describe.
    """
    spec = features.manifest.features
    content = read_content(features, video)
    try:
        values = unpack_features(content, channels=spec.channels, num_steps=video.num_steps, dtype=spec.dtype)
    except ValueError as error:
        raise DecodeError(f"{features.place(video.shard)}: {video.record.video_id}.{video.SUFFIX} {error}") from None
    return values.float()


def interpolate(values: Tensor, positions: np.ndarray) -> Tensor:
    """(C, T), places from 0 to T - 1 -> (C, n): linear between neighbours, exact on whole places."""
    # float64 places: a float32 has too few digits for a thousandth of a step in a long video.
    places = torch.from_numpy(np.round(positions, 6))  # what rates like 1 / (1 / 7.5) are off by
    left = places.floor().long()
    right = (left + 1).clamp(max=values.shape[1] - 1)
    return torch.lerp(values[:, left], values[:, right], (places - left).to(values.dtype))
