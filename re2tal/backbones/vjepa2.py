"""V-JEPA 2 (Assran et al., 2025): a ViT over tubelets of 2 x 16 x 16 pixels with rotary positions, no class token.

    tubelets -> blocks -> norm -> mean over H and W (the predictor of its pre-training is left out)
    block:  x = x + drop_path(attention(norm1(x)));  x = x + drop_path(mlp(norm2(x)))

The rotary positions are counted on the square grid it was trained on, so frames must have that size.
"""

from __future__ import annotations

from torch import Tensor
from transformers import VJEPA2Config, VJEPA2Model
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2Layer

from re2tal.backbones.base import BackboneConfig
from re2tal.backbones.prenorm import attention_branch, mlp_branch
from re2tal.backbones.pretrained import NANO, add_drop_path, clipwise, load_model
from re2tal.backbones.tiling import ClipEncoder, ClipwiseBackbone, pair
from re2tal.rewire import Branch, residual_branches, wrap_output

SIZES: dict[str, dict] = {
    "vjepa2_nano": NANO
    | {"crop_size": 32, "patch_size": 8, "frames_per_clip": 4, "mlp_ratio": 2.0}
    | {"pred_hidden_size": 48, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1},
    "vjepa2_large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "vjepa2_huge": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16},
    "vjepa2_giant": {"hidden_size": 1408, "num_hidden_layers": 40, "num_attention_heads": 22, "mlp_ratio": 48 / 11},
}


def build(config: BackboneConfig) -> ClipwiseBackbone:
    """The size that `config.name` names, random or from `config.weights` (facebook/vjepa2-vitl-fpc64-256, a folder)."""
    model = load_model(
        VJEPA2Model,
        VJEPA2Config(**SIZES[config.name]),
        weights=config.weights,
        kinds=("vjepa2",),
        optional=("predictor.",),
    )
    add_drop_path(model.encoder.layer, config.drop_path, after=("drop_path",))
    return clipwise(VJEPA2Encoder(model), config)


class VJEPA2Encoder(ClipEncoder):
    """The encoder of a transformers V-JEPA 2."""

    def __init__(self, model: VJEPA2Model) -> None:
        super().__init__()
        config = model.config
        del model.predictor
        self.model = model
        self.size = pair(config.crop_size)
        self.out_channels = config.hidden_size
        self.clip_frames = config.frames_per_clip
        self.patch = (config.tubelet_size, *pair(config.patch_size))

    def forward(self, clips: Tensor) -> Tensor:
        """(N, L, 3, H, W) -> (N, L / 2, C)."""
        if clips.shape[3:] != self.size:
            raise ValueError(
                f"V-JEPA 2 with these weights takes frames of {self.size[0]} x {self.size[1]} pixels, got "
                f"{clips.shape[3]} x {clips.shape[4]}; resize them, or choose weights trained at that size"
            )
        tokens = self.model.encoder(clips).last_hidden_state
        return tokens.unflatten(1, (self.clip_frames // self.patch[0], -1)).mean(dim=2)


@residual_branches.register
def _(block: VJEPA2Layer) -> tuple[Branch, ...]:
    return attention_branch("norm1", "attention", "drop_path"), mlp_branch("norm2", "mlp", "drop_path")


@wrap_output.register
def _(block: VJEPA2Layer, x: Tensor) -> tuple[Tensor, None]:
    return x, None  # the second is where attention weights would be
