"""V-JEPA 2 (Assran et al., 2025): a ViT over tubelets of 2 x 16 x 16 pixels with rotary positions, no class token.

    tubelets -> blocks -> norm -> mean over H and W (the predictor of its pre-training is left out)
    block:  x = x + drop_path(attention(norm1(x)));  x = x + drop_path(mlp(norm2(x)))

The rotary positions are those of each token's step, row and column, counted from 0 and not stretched to other sizes,
as in the released networks of 256 and 384 pixels. The library takes rows and columns from its configuration, which
knows square pictures only; here they come from the frames.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import VJEPA2Config, VJEPA2Model
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2Layer, VJEPA2RopeAttention

from re2tal.backbones.base import BackboneConfig
from re2tal.backbones.hub.prenorm import attention_branch, mlp_branch
from re2tal.backbones.hub.pretrained import NANO, add_drop_path, clipwise, load_model
from re2tal.backbones.hub.tiling import ClipEncoder, ClipwiseBackbone, pair
from re2tal.backbones.hub.vjepa2_layouts import ORIGINAL
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
    return clipwise(VJEPA2Encoder(model), config, layouts=(ORIGINAL,))


class VJEPA2Encoder(ClipEncoder):
    """The encoder of a transformers V-JEPA 2, for frames of any size."""

    def __init__(self, model: VJEPA2Model) -> None:
        super().__init__()
        config = model.config
        del model.predictor
        self.model = model
        for layer in model.encoder.layer:
            layer.attention.__class__ = AttentionAtPositions  # the same parameters, other positions
        self.size = pair(config.crop_size)
        self.out_channels = config.hidden_size
        self.clip_frames = config.frames_per_clip
        self.patch = (config.tubelet_size, *pair(config.patch_size))

    def forward(self, clips: Tensor) -> Tensor:
        """(N, L, 3, H, W) -> (N, L / 2, C)."""
        shape = (clips.shape[1], *clips.shape[3:])
        steps, rows, columns = (size // patch for size, patch in zip(shape, self.patch, strict=True))
        positions = grid_positions(steps, rows, columns, device=clips.device)
        encoder = self.model.encoder
        tokens = encoder.embeddings(clips)
        for layer in encoder.layer:
            tokens = layer(tokens, positions)[0]
        return encoder.layernorm(tokens).unflatten(1, (steps, -1)).mean(dim=2)


def grid_positions(steps: int, rows: int, columns: int, *, device: torch.device) -> Tensor:
    """Step, row and column of every token, in the order of the tokens: (1, 3, steps * rows * columns)."""
    axes = (torch.arange(size, device=device) for size in (steps, rows, columns))
    return torch.cartesian_prod(*axes).T[None]


class AttentionAtPositions(VJEPA2RopeAttention):
    """Takes the positions of its tokens, from `grid_positions`; without them it counts as the library does."""

    def get_position_ids(self, x: Tensor, masks: Tensor | None = None) -> tuple[Tensor, ...]:
        """Steps, rows and columns, each (tokens,)."""
        return super().get_position_ids(x) if masks is None else masks[0].unbind()


@residual_branches.register
def _(block: VJEPA2Layer) -> tuple[Branch, ...]:
    return (
        attention_branch("norm1", "attention", "drop_path", last="attention.proj"),
        mlp_branch("norm2", "mlp", "drop_path", last="mlp.fc2"),
    )


@wrap_output.register
def _(block: VJEPA2Layer, x: Tensor) -> tuple[Tensor, None]:
    return x, None  # the second is where attention weights would be
