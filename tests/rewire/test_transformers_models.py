"""Models of the transformers library whose blocks get arguments of their own, or whose states are read in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from re2tal.rewire import RewiringConfig, rewire

TINY = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {**TINY, "image_size": 32, "patch_size": 16}
QWEN = {"depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "out_hidden_size": 16}
WORDS = {**TINY, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


PICTURE = {"pixel_values": drawn(1, 3, 32, 32)}
PATCHES = {"hidden_states": drawn(64, 96), "grid_thw": torch.tensor([[1, 8, 8]])}
TOKENS = {"input_ids": torch.arange(8)[None], "use_cache": False}


def qwen25() -> nn.Module:
    config = Qwen2_5_VLVisionConfig(**QWEN, window_size=16, fullatt_block_indexes=[1, 3])
    return Qwen2_5_VisionTransformerPretrainedModel(config)


def qwen3() -> nn.Module:
    return Qwen3VLVisionModel(Qwen3VLVisionConfig(**QWEN, deepstack_visual_indexes=[1, 2]))


def vit(**options: Any) -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**IMAGE, **options))


def dinov2_backbone() -> nn.Module:
    config = transformers.Dinov2Config(**IMAGE, out_features=["stage2", "stage4"])
    return transformers.Dinov2Backbone(config)


def llama() -> nn.Module:
    return transformers.LlamaModel(transformers.LlamaConfig(**WORDS))


def shared_vit() -> nn.Module:
    """One block four times, as ALBERT does it."""
    model = vit()
    model.layers = nn.ModuleList([model.layers[0]] * 4)
    return model


EXACT: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int]] = {
    "Qwen2.5-VL's windows": (qwen25, PATCHES, 0),
    "Qwen3-VL's deepstack": (qwen3, PATCHES, 2),
    "Dinov2Backbone's feature maps": (dinov2_backbone, PICTURE, 1),
    "ViT": (vit, PICTURE, 0),
    "ViT's hidden states": (vit, {**PICTURE, "output_hidden_states": True}, 3),
    "one block of a ViT four times": (shared_vit, PICTURE, 0),
    "Llama without its cache": (llama, TOKENS, 0),
}


def built(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().train()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def gradients(model: nn.Module, example: dict[str, Any]) -> list[Tensor]:
    """In float64, of a loss on every tensor of the output."""
    model.double()
    output = model(**{name: value.double() if name in ("pixel_values",) else value for name, value in example.items()})
    leaves = [leaf for leaf in tree_leaves(dict(output)) if isinstance(leaf, Tensor)]
    assert leaves
    torch.stack([(leaf * torch.linspace(-1, 1, leaf.numel()).view_as(leaf)).sum() for leaf in leaves]).sum().backward()
    found = [leaf.detach() for leaf in leaves]
    return [*found, *(one.grad for one in model.parameters() if one.grad is not None)]


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for have, want in zip(found, wanted, strict=True):
        # These models round to float32 inside: rotary positions, norms, softmax.
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()) + 1e-7)


@pytest.mark.parametrize("name", EXACT)
def test_at_beta_0_it_is_the_plain_model_in_values_and_gradients(name) -> None:
    build, example, ends = EXACT[name]
    model = built(build)
    report = rewire(model, example=example, config=RewiringConfig(beta=0.0))
    assert sum(stage.rewired_blocks for stage in report.stages) == 4
    assert len(report.ends) == ends
    assert_close(gradients(model, example), gradients(built(build), example))


@pytest.mark.parametrize("name", EXACT)
def test_gradients_match_plain_autograd_through_the_coupled_blocks(name) -> None:
    build, example, _ = EXACT[name]
    found = []
    for recompute in (True, False):
        model = built(build)
        rewire(model, example=example, config=RewiringConfig(recompute=recompute))
        found.append(gradients(model, example))
    assert_close(*found)


def test_hidden_states_that_the_example_did_not_return_are_an_error() -> None:
    model = built(vit)
    rewire(model, example=PICTURE)

    def read() -> Tensor:
        return model(**PICTURE, output_hidden_states=True).hidden_states[1].sum()

    # Registered blocks run, and the state has no values; discovered ones were not taken apart for this argument.
    with pytest.raises(ValueError, match=r"state behind block layers\.0 is used by|was taken apart when"):
        read()


REFUSED = {
    "attentions": (
        lambda: vit(attn_implementation="eager"),
        {**PICTURE, "output_attentions": True},
        r"output\.attentions\[0\] of this ViTModel has a gradient, and would have none rewired",
    ),
    "a bias that blocks share": (
        lambda: transformers.BeitModel(transformers.BeitConfig(**IMAGE, use_shared_relative_position_bias=True)),
        PICTURE,
        "a further argument that wants a gradient",
    ),
    "a cache": (llama, {**TOKENS, "use_cache": True}, "it is called with a DynamicCache, whose contents may change"),
    "post-norm": (
        lambda: transformers.AlbertModel(transformers.AlbertConfig(**WORDS, embedding_size=16)),
        {"input_ids": TOKENS["input_ids"]},
        "a norm after the sum",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused_with_the_reason(name) -> None:
    build, example, reason = REFUSED[name]
    model = built(build)
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        rewire(model, example=example)
