"""Sizes of a reference case's video network, as our backbones take them."""

from __future__ import annotations

from typing import Any

from parity.vectors import Case

DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def swin_size(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of VideoSwin for OpenTAD's configuration of one."""
    return {
        "embed_dim": config["embed_dim"],
        "depths": tuple(config["depths"]),
        "num_heads": tuple(config["num_heads"]),
        "window": tuple(config["window_size"]),
        "patch": tuple(config["patch_size"]),
        "mlp_ratio": config["mlp_ratio"],
    }


def slowfast_size(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of SlowFast for OpenTAD's configuration of one, but for its block and `frames_per_step`."""
    slow = config["slow_pathway"]
    return {
        "depths": DEPTHS[slow["depth"]],
        "base_channels": slow["base_channels"],
        "slow_stride": config["resample_rate"],
        "speed_ratio": config["speed_ratio"],
        "channel_ratio": config["channel_ratio"],
        "fusion_kernel": slow["fusion_kernel"],
    }


def frames_per_step(case: Case) -> int:
    """Frames per step of the localizer's grid: OpenTAD resamples each pathway of a SlowFast to it before it joins
    them."""
    return case.arrays["frames"].shape[3] // case.config["num_steps"]


def videomae_size(config: dict[str, Any]) -> dict[str, Any]:
    """A row of VideoMAE's SIZES for mmaction2's or OpenTAD's configuration of one."""
    return {
        "hidden_size": config["embed_dims"],
        "num_hidden_layers": config["depth"],
        "num_attention_heads": config["num_heads"],
        "intermediate_size": int(config["embed_dims"] * config.get("mlp_ratio", 4)),
        "image_size": config["img_size"],
        "patch_size": config["patch_size"],
        "num_frames": config["num_frames"],
        "tubelet_size": config.get("tubelet_size", 2),
        "layer_norm_eps": config.get("norm_cfg", {}).get("eps", 1e-6),
    }
