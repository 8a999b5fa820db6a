"""The architectures that architectures.py rewires: small configurations with random weights, and examples for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Example = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """An architecture."""

    name: str
    library: str
    build: Callable[[], nn.Module]
    example: Callable[[], Any]
    """Draws it, in float64."""
    tolerance: float = 1e-9
    """At beta 0, of the largest element."""
    training: bool = False
    """Whether gradients are those of training mode: it caches what it trains in evaluation mode."""


SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE = SMALL | {"image_size": 32, "patch_size": 8}
STAGES = {"depths": [2, 2, 2, 2], "embed_dim": 16, "num_heads": [1, 2, 4, 8], "image_size": 64, "patch_size": 4}
WIDTHS = {"hidden_sizes": [16, 32, 48, 64]}
HEADS = WIDTHS | {"num_attention_heads": [1, 2, 3, 4]}
CONVS = WIDTHS | {"depths": [2, 2, 2, 2], "embedding_size": 16}
CONVNEXT = WIDTHS | {"depths": [2, 2, 3, 2]}
VIDEO = IMAGE | {"num_frames": 4}
TEXT = SMALL | {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LANGUAGE = TEXT | {"num_key_value_heads": 2, "head_dim": 16}
QWEN = {"depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "out_hidden_size": 16}

WAVES = {"conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [8, 4], "num_feat_extract_layers": 2} | {
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}


def picture(size: int = 32) -> Callable[[], Example]:
    """Two of them."""
    return lambda: {"pixel_values": torch.randn(2, 3, size, size, dtype=torch.float64)}


def video(frames: int, size: int = 32, *, name: str = "pixel_values") -> Callable[[], Example]:
    """Two of them."""
    return lambda: {name: torch.randn(2, frames, 3, size, size, dtype=torch.float64)}


def frames_as_pictures(frames: int, size: int = 32) -> Callable[[], Example]:
    """Of two videos, one after the other."""
    return lambda: {"pixel_values": torch.randn(2 * frames, 3, size, size, dtype=torch.float64)}


def words(**more: Any) -> Callable[[], Example]:
    """Two sentences, one of them padded."""

    def draw() -> Example:
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[1, 9:] = 0
        return {"input_ids": torch.randint(3, 99, (2, 12)), "attention_mask": mask, **more}

    return draw


def patches() -> Example:
    """Of a picture, as Qwen's vision towers take them."""
    return {"hidden_states": torch.randn(64, 96, dtype=torch.float64), "grid_thw": torch.tensor([[1, 8, 8]])}


def spectrum(name: str, *shape: int) -> Callable[[], Example]:
    """Two of them, or two series."""
    return lambda: {name: torch.randn(2, *shape, dtype=torch.float64)}


def sound() -> Example:
    """Two waves."""
    return {"input_values": torch.randn(2, 1600, dtype=torch.float64)}


def states() -> tuple[Tensor]:
    """Of tokens."""
    return (torch.randn(2, 9, 32, dtype=torch.float64),)


def hub(name: str, options: Mapping[str, Any], example: Callable[[], Any], model: str | None = None) -> Row:
    """`NameConfig(options)` and `NameModel`, or what `model` is called."""
    model = model or f"{name}Model"
    return Row(model, "transformers", lambda: _class(model)(_class(f"{name}Config")(**options)), example)


def _class(kind: str) -> Any:
    """Of transformers, which does not export all of them."""
    parts = [
        getattr(getattr(transformers.models, family), f"{part}_{family}")
        for family in ("qwen2_5_vl", "qwen3_vl", "whisper", "x_clip")
        for part in ("modeling", "configuration")
    ]
    return next(getattr(part, kind) for part in (transformers, *parts) if hasattr(part, kind))


def timm(name: str, size: int = 64, **options: Any) -> Row:
    """A model of timm, without its classifier."""

    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=0, **options)

    return Row(name, "timm", build, lambda: (torch.randn(2, 3, size, size, dtype=torch.float64),))


def encoder(*, norm_first: bool) -> Row:
    """torch.nn.TransformerEncoder."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=norm_first, dropout=0.0)
            self.body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    return Row(f"nn.TransformerEncoder({'pre' if norm_first else 'post'}-norm)", "torch", Encoder, states)


ROWS: tuple[Row, ...] = (
    encoder(norm_first=True),
    encoder(norm_first=False),
    # Vision transformers.
    hub("ViT", IMAGE, picture()),
    hub("DeiT", IMAGE, picture()),
    hub("Beit", IMAGE | {"use_relative_position_bias": True}, picture()),
    *(
        hub(name, IMAGE, picture())
        for name in ("Data2VecVision", "Dinov2", "Dinov2WithRegisters", "DINOv3ViT", "IJepa")
    ),
    *(hub(name, IMAGE, picture()) for name in ("CLIPVision", "SiglipVision", "MLCDVision", "PixtralVision", "ViTMAE")),
    hub("Yolos", IMAGE | {"image_size": [32, 32], "num_detection_tokens": 4}, picture()),
    hub(
        "SamVision",
        IMAGE
        | {"image_size": 64, "mlp_dim": 64, "window_size": 3, "global_attn_indexes": [1, 3], "output_channels": 16},
        picture(64),
    ),
    # Its norms compute in float32, and a mean depends on how a state lies in memory.
    replace(hub("Aimv2Vision", IMAGE, picture()), tolerance=1e-5),
    hub("VitDet", IMAGE | {"residual_block_indices": [1], "window_block_indices": [0, 2], "window_size": 2}, picture()),
    hub(
        "Hiera",
        {"embed_dim": 16, "image_size": [64, 64], "depths": [1, 2, 2, 1], "num_heads": [1, 2, 4, 8]},
        picture(64),
    ),
    hub("Swin", STAGES | {"window_size": 2}, picture(64)),
    hub("Swinv2", STAGES | {"window_size": 4}, picture(64)),
    hub(
        "Qwen2_5_VLVision",
        QWEN | {"window_size": 16, "fullatt_block_indexes": [1, 3]},
        patches,
        "Qwen2_5_VisionTransformerPretrainedModel",
    ),
    hub("Qwen3VLVision", QWEN | {"deepstack_visual_indexes": [1, 2]}, patches),
    # Video.
    hub("VideoMAE", VIDEO, video(4)),
    hub("Vivit", VIDEO | {"tubelet_size": [2, 8, 8]}, video(4)),
    hub(
        "VJEPA2",
        IMAGE
        | {"crop_size": 32, "frames_per_clip": 4, "mlp_ratio": 2.0}
        | {"pred_hidden_size": 32, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 2},
        video(4, name="pixel_values_videos"),
    ),
    hub("Timesformer", VIDEO, video(4)),
    hub(
        "VideoPrismVision",
        {"hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 96, "num_frames": 4, "image_size": 32}
        | {"num_spatial_layers": 4, "num_temporal_layers": 2, "tubelet_size": (1, 8, 8)},
        video(4, name="pixel_values_videos"),
    ),
    hub("XCLIPVision", VIDEO | {"mit_hidden_size": 32, "mit_num_hidden_layers": 1}, frames_as_pictures(4)),
    # Convolutions.
    *(hub(name, CONVNEXT, picture(64)) for name in ("ConvNext", "ConvNextV2", "DINOv3ConvNext")),
    hub("ResNet", CONVS, picture(64)),
    hub("RegNet", CONVS | {"groups_width": 8}, picture(64)),
    hub("Bit", CONVS | {"num_groups": 8}, picture(64)),
    hub("MobileNetV2", {"depth_multiplier": 0.35}, picture(64)),
    hub("EfficientNet", {"width_coefficient": 0.3, "depth_coefficient": 1.0, "hidden_dim": 384}, picture(64)),
    hub("PoolFormer", WIDTHS | {"depths": [2, 2, 2, 2]}, picture(64)),
    hub("FocalNet", {"embed_dim": 16, "depths": [2, 2, 2, 2], "image_size": 64}, picture(64)),
    hub("PvtV2", HEADS | {"image_size": 64}, picture(64)),
    hub("Cvt", {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]}, picture(64)),
    hub(
        "MobileViT",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64]},
        picture(64),
    ),
    hub(
        "Swin2SR",
        {"image_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
        picture(),
    ),
    hub("Segformer", HEADS, picture(64)),
    # Language and sound.
    hub("Bert", TEXT, words()),
    hub("ModernBert", TEXT, words()),
    hub("DebertaV2", TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, words()),
    hub("Albert", TEXT | {"embedding_size": 16}, words()),
    hub("GPT2", {"n_embd": 32, "n_layer": 4, "n_head": 2, "vocab_size": 99}, words(use_cache=False)),
    hub("GPTNeoX", TEXT, words(use_cache=False)),
    *(hub(name, LANGUAGE, words(use_cache=False)) for name in ("Llama", "Qwen3", "Gemma2")),
    hub("Mamba", TEXT, lambda: {"input_ids": torch.randint(3, 99, (2, 12)), "use_cache": False}),
    hub(
        "T5",
        {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 4, "num_heads": 2, "vocab_size": 99},
        words(),
        "T5EncoderModel",
    ),
    hub("RoFormer", TEXT, words()),
    hub("XLNet", {"d_model": 32, "n_layer": 4, "n_head": 2, "d_inner": 64, "vocab_size": 99}, words(use_mems=False)),
    hub(
        "Mixtral",
        LANGUAGE | {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
        words(use_cache=False),
    ),
    hub("Wav2Vec2", SMALL | WAVES, sound),
    hub("Hubert", SMALL | WAVES, sound),
    hub("AST", SMALL | {"max_length": 64, "num_mel_bins": 16}, spectrum("input_values", 64, 16)),
    hub(
        "Whisper",
        {"d_model": 32, "encoder_layers": 4, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "num_mel_bins": 16}
        | {"vocab_size": 99, "pad_token_id": 0, "max_source_positions": 32},
        spectrum("input_features", 16, 64),
        "WhisperEncoder",
    ),
    hub(
        "PatchTST",
        {"d_model": 32, "ffn_dim": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "num_input_channels": 3}
        | {"context_length": 32, "patch_length": 4, "patch_stride": 4},
        spectrum("past_values", 32, 3),
    ),
    # timm.
    timm("vit_tiny_patch16_224", depth=4, img_size=64),
    timm("deit3_small_patch16_224", depth=4, num_heads=2, embed_dim=64, img_size=64),
    timm("eva02_tiny_patch14_224", 56, depth=4, img_size=56),
    timm("swin_tiny_patch4_window7_224", embed_dim=24, depths=(2, 2, 2, 2), img_size=64, window_size=4),
    timm("convnext_atto", depths=(2, 2, 2, 2), dims=(16, 32, 48, 64)),
    timm("convnextv2_atto", depths=(2, 2, 2, 2), dims=(16, 32, 48, 64)),
    timm("resnet18"),
    timm("resnet26d"),
    timm("resnetv2_50", layers=(2, 2, 2, 2)),
    timm("regnetx_002"),
    timm("mobilenetv2_035"),
    timm("mobilenetv3_small_050"),
    timm("efficientnet_b0"),
    timm("mixer_s32_224", img_size=64),
    timm("xcit_nano_12_p16_224", depth=4, img_size=64),
    timm("cait_xxs24_224", depth=4, img_size=64),
    timm("poolformer_s12"),
    timm("densenet121", block_config=(2, 2, 2, 2)),
    timm("hiera_tiny_224", embed_dim=24, stages=(1, 2, 3, 1), img_size=(64, 64)),
    timm("swinv2_cr_tiny_ns_224", embed_dim=24, depths=(2, 2, 2, 2), img_size=64, window_size=4),
    timm("davit_tiny", depths=(1, 1, 2, 1), embed_dims=(24, 48, 96, 192)),
    timm("convit_tiny", depth=4, local_up_to_layer=2, img_size=64),
    timm("edgenext_xx_small"),
    timm("inception_next_atto"),
    replace(timm("levit_128s", 128, img_size=128), training=True),
    timm("mambaout_femto", depths=(2, 2, 2, 2), dims=(16, 32, 48, 64)),
    timm("mobilevit_xxs"),
    timm("nf_regnet_b0"),
    replace(timm("tiny_vit_5m_224"), training=True),
    timm("twins_svt_small", embed_dims=(16, 32, 64, 128), depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), img_size=64),
    timm("vit_relpos_small_patch16_224", depth=4, embed_dim=48, num_heads=2, img_size=64),
    timm("vit_small_patch16_18x2_224", depth=4, embed_dim=48, num_heads=2, img_size=64),
    timm("samvit_base_patch16_224", depth=4, embed_dim=48, num_heads=2, img_size=64, global_attn_indexes=(1, 3)),
    timm("naflexvit_base_patch16_gap", depth=4, embed_dim=48, num_heads=2),
    timm("sequencer2d_s", layers=(1, 2, 2, 1), embed_dims=(24, 48, 48, 48), hidden_sizes=(6, 12, 12, 12), img_size=64),
    timm("res2net50d", layers=(1, 1, 2, 1)),
    timm("starnet_s050"),
    timm("efficientvit_b0"),
    timm("mvitv2_tiny", img_size=64),
    timm("tnt_s_patch16_224", depth=4, img_size=64),
    timm("rexnet_100"),
)

QUICK = ("ViTModel", "Dinov2Model", "XCLIPVisionModel", "ConvNextModel", "ResNetModel", "MobileNetV2Model",
    "SwinModel", "BertModel", "nn.TransformerEncoder(pre-norm)", "nn.TransformerEncoder(post-norm)")  # fmt: skip
