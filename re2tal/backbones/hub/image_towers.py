"""Image transformers, one frame at a time: ViT, DINOv2, DINOv3, CLIP, SigLIP.

    every frame -> patches -> blocks -> norm -> the tower's own summary of a picture

The summary is the class token, or for SigLIP what its attention pooling returns. All are chains of pre-norm blocks
with an attention and an MLP branch, scaled by a learned vector in DINO.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer
from transformers.models.vit.modeling_vit import ViTLayer

from re2tal.backbones.base import BackboneConfig
from re2tal.backbones.hub.prenorm import attention_branch, mlp_branch
from re2tal.backbones.hub.pretrained import NANO, add_drop_path, clipwise, load_model
from re2tal.backbones.hub.tiling import ClipEncoder, ClipwiseBackbone, pair
from re2tal.rewire import Branch, residual_branches


@dataclass(frozen=True)
class Tower:
    """The differences between the image families."""

    model: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    kinds: tuple[str, ...]
    """Model types of config.json that hold such a tower."""
    blocks: str
    """Path of the list of blocks."""
    branch_end: str | None
    """The submodule that ends both branches of a block, behind which drop-path goes; None if there is none."""
    optional: tuple[str, ...] = ()
    """Entries whose names begin so may be missing from weights."""
    resize: bool = True
    """Whether its forward needs `interpolate_pos_encoding` to take other picture sizes."""


VIT = Tower(ViTModel, ViTConfig, ("vit",), "layers", "dropout", optional=("pooler.",))
DINOV2 = Tower(
    Dinov2Model,
    Dinov2Config,
    ("dinov2",),
    "encoder.layer",
    "drop_path",
    optional=("embeddings.mask_token",),
    resize=False,
)
DINOV3 = Tower(
    DINOv3ViTModel,
    DINOv3ViTConfig,
    ("dinov3_vit",),
    "model.layer",
    "drop_path",
    optional=("embeddings.mask_token",),
    resize=False,
)
CLIP = Tower(CLIPVisionModel, CLIPVisionConfig, ("clip_vision_model", "clip"), "encoder.layers", None)
SIGLIP = Tower(SiglipVisionModel, SiglipVisionConfig, ("siglip_vision_model", "siglip"), "encoder.layers", None)

SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}

NANO_TOWER = NANO | {"image_size": 32, "patch_size": 8}

SIZES: dict[str, tuple[Tower, dict]] = {
    "vit_nano": (VIT, NANO_TOWER | {"intermediate_size": 96}),
    "dinov2_nano": (DINOV2, NANO_TOWER | {"mlp_ratio": 2}),
    "dinov3_nano": (DINOV3, NANO_TOWER | {"num_register_tokens": 4, "intermediate_size": 96}),
    "clip_nano": (CLIP, NANO_TOWER | {"intermediate_size": 96}),
    "siglip_nano": (SIGLIP, NANO_TOWER | {"intermediate_size": 96}),
    "vit_base": (VIT, BASE),
    "vit_large": (VIT, LARGE | {"intermediate_size": 4096}),
    "dinov2_small": (DINOV2, SMALL),
    "dinov2_base": (DINOV2, BASE),
    "dinov2_large": (DINOV2, LARGE),
    "dinov3_small": (DINOV3, SMALL | {"num_register_tokens": 4}),
    "dinov3_base": (DINOV3, BASE | {"num_register_tokens": 4, "intermediate_size": 3072}),
    "dinov3_large": (DINOV3, LARGE | {"num_register_tokens": 4, "intermediate_size": 4096}),
    "clip_base": (CLIP, BASE | {"patch_size": 16}),
    "clip_large": (CLIP, LARGE | {"patch_size": 14, "intermediate_size": 4096}),
    "siglip_base": (SIGLIP, BASE),
    "siglip_large": (SIGLIP, LARGE | {"intermediate_size": 4096}),
}


def build(config: BackboneConfig) -> ClipwiseBackbone:
    """The tower that `config.name` names, random or from `config.weights` (facebook/dinov2-base, a folder, ...)."""
    tower, size = SIZES[config.name]
    model = load_model(
        tower.model, tower.config(**size), weights=config.weights, kinds=tower.kinds, optional=tower.optional
    )
    if tower.branch_end is not None:
        add_drop_path(model.get_submodule(tower.blocks).children(), config.drop_path, after=(tower.branch_end,))
    elif config.drop_path:
        raise ValueError(f"the blocks of {config.name} have no place for drop_path {config.drop_path}; set it to 0")
    return clipwise(ImageTower(model, resize=tower.resize), config)


class ImageTower(ClipEncoder):
    """A transformers image model that summarises each frame on its own, of any size."""

    def __init__(self, model: PreTrainedModel, *, resize: bool) -> None:
        super().__init__()
        self.model = model
        self.options = {"interpolate_pos_encoding": True} if resize else {}
        self.out_channels = model.config.hidden_size
        self.clip_frames = 1
        self.size = pair(model.config.image_size)
        self.patch = (1, *pair(model.config.patch_size))
        if isinstance(model, ViTModel):
            # A tanh layer that only the original's fine-tuning uses; most published weights lack it.
            model.pooler = None
        if isinstance(model, Dinov2Model | DINOv3ViTModel):
            model.embeddings.mask_token = None  # stands for hidden patches in pre-training

    def forward(self, clips: Tensor) -> Tensor:
        """(N, 1, 3, H, W) -> (N, 1, C)."""
        outputs = self.model(clips[:, 0], **self.options)
        summary = outputs.last_hidden_state[:, 0] if outputs.pooler_output is None else outputs.pooler_output
        return summary[:, None]


@residual_branches.register
def _(block: ViTLayer) -> tuple[Branch, ...]:
    return (
        attention_branch("layernorm_before", "attention", "dropout", last="attention.o_proj"),
        mlp_branch("layernorm_after", "mlp", "dropout", last="mlp.fc2"),
    )


@residual_branches.register
def _(block: Dinov2Layer | DINOv3ViTLayer) -> tuple[Branch, ...]:
    return (
        attention_branch("norm1", "attention", "layer_scale1", "drop_path"),
        mlp_branch("norm2", "mlp", "layer_scale2", "drop_path"),
    )


@residual_branches.register
def _(block: CLIPEncoderLayer | SiglipEncoderLayer) -> tuple[Branch, ...]:
    return (
        attention_branch("layer_norm1", "self_attn", last="self_attn.out_proj"),
        mlp_branch("layer_norm2", "mlp", last="mlp.fc2"),
    )
