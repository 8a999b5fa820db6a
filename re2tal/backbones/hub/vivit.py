"""ViViT, model 1 (Arnab et al., ICCV 2021): a ViT over tubelets of 2 x 16 x 16 pixels, clips of 32 frames.

class token, tubelets + learned positions -> blocks -> norm -> mean over H and W (the class token is left out)
block:  x = x + dropout(attention(layernorm_before(x)));  x = x + dropout(mlp(layernorm_after(x)))
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import VivitConfig, VivitModel
from transformers.models.vivit.modeling_vivit import VivitEmbeddings, VivitLayer

from re2tal.backbones.base import BackboneConfig
from re2tal.backbones.hub.prenorm import attention_branch, mlp_branch
from re2tal.backbones.hub.pretrained import NANO, add_drop_path, clipwise, load_model
from re2tal.backbones.hub.tiling import ClipEncoder, ClipwiseBackbone, pair, resize_positions
from re2tal.rewire import Branch, residual_branches

SIZES: dict[str, dict] = {
    "vivit_nano": NANO | {"image_size": 32, "tubelet_size": (2, 8, 8), "num_frames": 4, "intermediate_size": 96},
    "vivit_base": {},
}


def build(config: BackboneConfig) -> ClipwiseBackbone:
    """The size that `config.name` names, random or from `config.weights` (google/vivit-b-16x2-kinetics400)."""
    model = load_model(
        VivitModel, VivitConfig(**SIZES[config.name]), weights=config.weights, kinds=("vivit",), optional=("pooler.",)
    )
    add_drop_path(model.layers, config.drop_path, after=("dropout",))
    return clipwise(VivitEncoder(model), config)


class VivitEncoder(ClipEncoder):
    """A transformers ViViT for frames of any size."""

    def __init__(self, model: VivitModel) -> None:
        super().__init__()
        self.model = model
        self.model.pooler = None
        self.model.embeddings.__class__ = ResizableEmbeddings  # the same parameters, another interpolation
        self.out_channels = model.config.hidden_size
        self.clip_frames = model.config.num_frames
        self.size = pair(model.config.image_size)
        self.patch = (model.config.tubelet_size[0], *pair(model.config.tubelet_size[1:]))

    def forward(self, clips: Tensor) -> Tensor:
        """(N, L, 3, H, W) -> (N, L / 2, C)."""
        tokens = self.model(clips, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
        return tokens.unflatten(1, (self.clip_frames // self.patch[0], -1)).mean(dim=2)


class ResizableEmbeddings(VivitEmbeddings):
    """Interpolates the positions over (time, rows, columns); the library's own assumes one square picture."""

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """(1, 1 + tokens, C) positions for frames of height x width pixels."""
        rows, columns = (size // p for size, p in zip(self.image_size, self.patch_size, strict=True))
        steps = self.patch_embeddings.num_patches // (rows * columns)
        class_token, table = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        new_grid = (steps, height // self.patch_size[0], width // self.patch_size[1])
        return torch.cat([class_token, resize_positions(table, grid=(steps, rows, columns), new_grid=new_grid)], dim=1)


@residual_branches.register
def _(block: VivitLayer) -> tuple[Branch, ...]:
    return (
        attention_branch("layernorm_before", "attention", "dropout", last="attention.o_proj"),
        mlp_branch("layernorm_after", "mlp", "dropout", last="mlp.fc2"),
    )
