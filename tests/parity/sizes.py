"""Sizes of a reference case's video network, as our backbones take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parity.arguments import Arguments, as_tuple
from parity.vectors import Case

DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def swin_size(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of VideoSwin for those of mmaction2, torchvision or OpenTAD, with their defaults."""
    # mmaction2 keeps some of them apart, and says `embed_dims`.
    with Arguments("swin", {**given, **given.get("arch", {})}) as swin:
        swin.drop("arch", "type", "pretrained", "pretrained2d", "inv_mode", "out_indices", "num_classes", "with_cp")
        swin.drop("drop_path_rate", "stochastic_depth_prob", "drop_rate", "attn_drop_rate", "dropout")
        for name in ("qkv_bias", "patch_norm"):
            swin.only(name, True)
        swin.only("qk_scale", None)
        swin.only("out_after_downsample", False)
        swin.only("frozen_stages", -1)
        return {
            "embed_dim": swin.take("embed_dims" if "embed_dims" in given.get("arch", ()) else "embed_dim"),
            "depths": swin.take("depths"),
            "num_heads": swin.take("num_heads"),
            "window": swin.take("window_size", (8, 7, 7)),
            "patch": swin.take("patch_size", (2, 4, 4)),
            "mlp_ratio": swin.take("mlp_ratio", 4.0),
        }


def slowfast_size(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of SlowFast for those of mmaction2 or OpenTAD, but for its block and `frames_per_step`."""
    with Arguments("slowfast", given) as both, both.part("slow_pathway") as slow, both.part("fast_pathway") as fast:
        both.drop("type", "pretrained", "pretrain_type", "inv_mode")
        size = {
            "depths": DEPTHS[slow.take("depth")],
            "base_channels": slow.take("base_channels", 64),
            "slow_stride": both.take("resample_rate", 8),
            "speed_ratio": both.take("speed_ratio", 8),
            "channel_ratio": both.take("channel_ratio", 8),
            "fusion_kernel": slow.take("fusion_kernel", 5),
        }
        for pathway, conv1, inflate in ((slow, 1, (0, 0, 1, 1)), (fast, 5, (1, 1, 1, 1))):
            pathway.drop("type", "pretrained", "norm_eval", "with_cp", "fusion_kernel")
            pathway.only("lateral", pathway is slow)
            pathway.only("conv1_kernel", (conv1, 7, 7))
            pathway.only("inflate", inflate)
            pathway.only("dilations", (1, 1, 1, 1))
            pathway.only("frozen_stages", -1)
            for name in ("conv1_stride_t", "pool1_stride_t"):
                pathway.only(name, 1)
        fast.only("base_channels", size["base_channels"] // size["channel_ratio"])
        assert DEPTHS[fast.take("depth")] == size["depths"]
        return size


def frames_per_step(case: Case) -> int:
    """Frames per step of the localizer's grid: OpenTAD resamples each pathway of a SlowFast to it before it joins
    them."""
    return case.arrays["frames"].shape[3] // case.config["num_steps"]


def videomae_size(given: Mapping[str, Any]) -> dict[str, Any]:
    """A row of VideoMAE's SIZES for mmaction2's or OpenTAD's arguments."""
    with Arguments("videomae", given) as vit:
        vit.drop("type", "drop_path_rate", "drop_rate", "attn_drop_rate", "with_cp", "return_feat_map", "total_frames")
        # What follows from the weights, and what `adapter_fields` reads.
        vit.drop("qkv_bias", "init_values", "use_mean_pooling", "use_learnable_pos_emb", "pretrained")
        vit.drop("adapter_index", "adapter_mlp_ratio")
        vit.only("qk_scale", None)
        with vit.part("norm_cfg", {}) as norm:
            norm.only("type", "LN")
            eps = norm.take("eps", 1e-6)
        width = vit.take("embed_dims", 768)
        return {
            "hidden_size": width,
            "num_hidden_layers": vit.take("depth", 12),
            "num_attention_heads": vit.take("num_heads", 12),
            "intermediate_size": int(width * vit.take("mlp_ratio", 4)),
            "image_size": vit.take("img_size", 224),
            "patch_size": vit.take("patch_size", 16),
            "num_frames": vit.take("num_frames", 16),
            "tubelet_size": vit.take("tubelet_size", 2),
            "layer_norm_eps": eps,
        }


def adapter_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of BackboneConfig for what OpenTAD's arguments say of adapters."""
    return {
        "adapter": "temporal",
        "adapter_blocks": as_tuple(given["adapter_index"]),
        "adapter_ratio": given.get("adapter_mlp_ratio", 0.25),
    }
