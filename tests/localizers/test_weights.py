"""Names and shapes of public checkpoints, and what is said of those that do not fit."""

from __future__ import annotations

import pytest
import torch

from re2tal.localizers.pyramid.actionformer import ActionFormerConfig, Variant, actionformer
from re2tal.localizers.pyramid.localizer import PyramidLocalizer
from re2tal.localizers.pyramid.tridet import TriDetConfig, tridet
from re2tal.localizers.weights import export_weights, import_weights

TINY = ActionFormerConfig(channels=8, num_heads=2, max_num_steps=8, regression_ranges=((0, 4), (4, 100)))
both_layouts = pytest.mark.parametrize("layout", ["opentad", "original"])


def build(seed: int) -> PyramidLocalizer:
    torch.manual_seed(seed)
    return actionformer(TINY, in_channels=4, classes=("dive", "jump"))


@both_layouts
def test_a_localizer_loads_what_another_exported(layout: Variant) -> None:
    first, second = build(0), build(1)
    public = export_weights(first, layout=layout)
    second.load_state_dict(import_weights(public, localizer=second, layout=layout))
    for (name, ours), theirs in zip(second.state_dict().items(), first.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@both_layouts
def test_missing_and_left_over_weights_are_named(layout: Variant) -> None:
    localizer = build(0)
    public = export_weights(localizer, layout=layout)
    public["neck.fpn_norms.7.weight"] = public.pop("neck.fpn_norms.1.weight")
    with pytest.raises(
        ValueError, match=r"missing 1 \(neck.fpn_norms.1.weight\), left over 1 \(neck.fpn_norms.7.weight\)"
    ):
        import_weights(public, localizer=localizer, layout=layout)


def test_weights_of_another_size_are_named_with_both_shapes() -> None:
    localizer = build(0)
    public = export_weights(localizer, layout="opentad")
    public["rpn_head.cls_head.bias"] = torch.zeros(20)
    with pytest.raises(ValueError, match=r"rpn_head.cls_head.bias is \(20,\), classifier.output.bias is \(2,\)"):
        import_weights(public, localizer=localizer, layout="opentad")


@both_layouts
def test_a_model_without_drop_path_scales_no_branch(layout: Variant) -> None:
    """Both build bare branches where `path_pdrop` is 0."""
    localizer = build(0)
    public = export_weights(localizer, layout=layout)
    scales = [name for name in public if ".drop_path_" in name]
    bare = {name: tensor for name, tensor in public.items() if name not in scales}
    found = import_weights(bare, localizer=localizer, layout=layout)
    expected = import_weights(
        public | {name: torch.ones_like(public[name]) for name in scales}, localizer=localizer, layout=layout
    )
    assert len(scales) > 2
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    with pytest.raises(ValueError, match="missing 1 "):  # some, but not all
        import_weights(bare | {name: public[name] for name in scales[1:]}, localizer=localizer, layout=layout)


def test_a_video_backbone_beside_the_localizer_is_passed_over() -> None:
    localizer = build(0)
    public = export_weights(localizer, layout="opentad") | {"backbone.model.backbone.norm3.weight": torch.ones(3)}
    assert import_weights(public, localizer=localizer, layout="opentad").keys() == localizer.state_dict().keys()


def test_weights_trained_by_two_public_implementations_have_their_own_names() -> None:
    localizer = build(0)
    opentad, original = (export_weights(localizer, layout=layout) for layout in ("opentad", "original"))
    assert opentad["projection.stem.0.attn.query_norm.weight"].shape == (8,)
    assert original["backbone.stem.0.attn.query_norm.weight"].shape == (1, 8, 1)
    assert opentad["projection.stem.0.drop_path_attn.scale"].shape == (1, 8, 1)
    assert opentad["rpn_head.loss_normalizer"].item() == pytest.approx(100)
    assert not any("normalizer" in name for name in original)


def test_tridets_parts_have_opentads_names_and_shapes() -> None:
    config = TriDetConfig(
        channels=16,
        head_channels=24,
        mlp_channels=20,
        num_head_convs=1,
        num_stem_blocks=1,
        window=(1, 3),
        wide_ratio=1.2,
        downsampling="average",
        head_kernel_size=5,
        boundary_kernel_size=1,
        num_bins=6,
        max_num_steps=8,
        regression_ranges=((0, 4), (4, 100)),
    )
    public = export_weights(tridet(config, in_channels=4, classes=("dive", "jump")), layout="opentad")
    shapes = {key: tuple(tensor.shape) for key, tensor in public.items()}
    expected = {
        "projection.stem.0.convkw.weight": (16, 1, 3),
        "projection.branch.0.convkw.weight": (16, 1, 5),
        "projection.branch.0.psi.weight": (16, 1, 3),
        "projection.branch.0.downsample.1.weight": (16, 16, 1),
        "projection.branch.0.drop_path_out.scale": (1, 16, 1),
        "projection.branch.0.drop_path_mlp.scale": (1, 16, 1),
        "projection.branch.0.mlp.0.weight": (20, 16, 1),
        "neck.fpn_norms.1.weight": (16,),
        "rpn_head.cls_convs.0.conv.weight": (24, 16, 5),
        "rpn_head.cls_start_convs.0.conv.weight": (24, 16, 1),
        "rpn_head.cls_end_head.weight": (2, 24, 1),
        "rpn_head.reg_head.weight": (14, 24, 5),
        "rpn_head.scale.1.scale": (),
        "rpn_head.loss_normalizer": (),
    }
    assert expected.items() <= shapes.items()
    assert not any(key.startswith("projection.stem.0.drop_path") for key in shapes)
