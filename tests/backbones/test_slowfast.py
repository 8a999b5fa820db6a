"""What no reference vector shows of SlowFast: sizes, resampling, statistics when recomputing, faithful rewiring."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.backbones.slowfast.layouts import KEY_LAYOUTS
from re2tal.backbones.slowfast.network import SIZES, Bottleneck, InnerReluBottleneck, SlowFast
from re2tal.backbones.weights import export_state, load_weights
from re2tal.reversible.live_bytes import LiveBytes
from re2tal.rewire import RewiringConfig, rewire


def slowfast(*, block: type[Bottleneck] = Bottleneck, seed: int = 0, **arguments: int | bool) -> SlowFast:
    torch.manual_seed(seed)
    settings = {"depths": (1, 3, 2, 2), "base_channels": 8, "channel_ratio": 4} | arguments
    network = SlowFast(**settings, block=block)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return network


def clip(frames: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2, 3, frames, 40, 40, generator=torch.Generator().manual_seed(1))
    return x, torch.ones(2, frames, dtype=torch.bool)


@pytest.mark.parametrize(
    ("name", "millions"),
    # pytorchvideo's model zoo counts a 400-way classifier (0.922), which is not ours. mmaction2's laterals have no norm
    # (0.001 less); those of its R101 span 7 frames instead of 5 (0.086 more).
    [
        ("slowfast_r50_8x8_pytorchvideo", 34.57 - 0.922),
        ("slowfast_r101_8x8_pytorchvideo", 62.83 - 0.922),
        ("slowfast_r50_8x8", 34.57 - 0.922),
        ("slowfast_r101_8x8", 62.83 - 0.922 + 0.086),
    ],
)
def test_sizes_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    with torch.device("meta"):
        network = SlowFast(**SIZES[name], block=Bottleneck)
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert network.out_channels == 2304


@pytest.mark.parametrize("frames_per_step", [1, 2, 4])
def test_features_are_both_pathways_resampled_and_joined_slow_first(frames_per_step: int) -> None:
    network = slowfast(frames_per_step=frames_per_step).eval()
    frames, mask = clip()
    with torch.no_grad():
        features = network(frames, mask)
        slow, fast = (x.mean(dim=(3, 4)) for x in network.pathways(frames))
    resampled = [F.interpolate(x, size=16 // frames_per_step, mode="linear", align_corners=False) for x in (slow, fast)]
    torch.testing.assert_close(features.values, torch.cat(resampled, dim=1), rtol=0, atol=0)
    assert slow.shape[1:] == (256, 4)
    assert fast.shape[1:] == (64, 16)


def test_a_clip_that_does_not_fill_the_slow_stride_is_padded_with_zeros() -> None:
    network = slowfast().eval()
    frames, mask = clip(13)
    with torch.no_grad():
        short = network(frames, mask)
        padded = network(F.pad(frames, (0, 0, 0, 0, 0, 3)), F.pad(mask, (0, 3)))
    assert short.values.shape[-1] == 7
    assert torch.equal(short.values, padded.values[..., :7])
    assert torch.equal(short.mask, padded.mask[:, :7])


@pytest.mark.parametrize("downsample", [False, True])
def test_relu_moves_from_behind_the_sum_into_the_branch(downsample: bool) -> None:
    torch.manual_seed(0)
    inner = InnerReluBottleneck(16, 4, kernel=3, stride=1, downsample=downsample).eval()
    plain = Bottleneck(16, 4, kernel=3, stride=1, downsample=downsample).eval()
    plain.load_state_dict(inner.state_dict())
    x = torch.randn(1, 16, 3, 5, 5)
    skip, body = plain.skip(x), plain.body(x)
    torch.testing.assert_close(inner(x), skip + body.clamp(min=0))
    torch.testing.assert_close(plain(x), (skip + body).clamp(min=0))


def test_recomputation_in_training_updates_statistics_once_and_keeps_every_gradient() -> None:
    frames, mask = clip()
    networks = []
    for recompute in (True, False):
        network = slowfast(block=InnerReluBottleneck).double()
        rewire(network, config=RewiringConfig(recompute=recompute))
        network(frames.double(), mask).values.square().mean().backward()
        networks.append(network)
    rebuilt, kept = networks
    for (name, one), (_, other) in zip(rebuilt.named_buffers(), kept.named_buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=name)
    assert {int(b) for name, b in rebuilt.named_buffers() if name.endswith("num_batches_tracked")} == {1}
    for (name, one), (_, other) in zip(rebuilt.named_parameters(), kept.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12, msg=name)


class Deep(nn.Module):
    """A stage: a block that halves the picture and doubles the channels, and `depth` residual ones."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        residual = (InnerReluBottleneck(64, 16, kernel=1, stride=1, downsample=False) for _ in range(depth))
        self.stage = nn.Sequential(InnerReluBottleneck(32, 16, kernel=1, stride=2, downsample=True), *residual)
        self.eval()


def bytes_of(depth: int, **fields: bool | float) -> tuple[int, int]:
    """What a deep stage keeps between forward and backward, and its peak; gradients of parameters are there before."""
    net = Deep(depth)
    rewire(net, config=RewiringConfig(**fields))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x = torch.zeros(2, 32, 4, 16, 16, requires_grad=True)
    net.stage(x).sum().backward()  # the first step is checked, for which a sample is kept
    with LiveBytes() as live:
        loss = net.stage(x).sum()
        kept = live.live
        loss.backward()
    return kept, live.peak


@pytest.mark.parametrize("chunk_mebibytes", [None, 0.25])
def test_a_first_block_that_is_kept_takes_its_insides_alone(chunk_mebibytes: float | None) -> None:
    """What convolutions give and what norms give, but not the downsampling norm, which is only added."""
    (kept, peak), (forgot, least) = (
        bytes_of(6, keep_nonresidual=keep, chunk_mebibytes=chunk_mebibytes) for keep in (True, False)
    )
    whole, half = 2 * 4 * 16 * 16 * 4, 2 * 4 * 8 * 8 * 4  # bytes of a channel
    insides = 2 * 16 * whole + 2 * 16 * half + 2 * 64 * half + 64 * half
    assert kept - forgot == insides
    assert 0 < peak - least <= insides
    assert bytes_of(12, keep_nonresidual=True, chunk_mebibytes=chunk_mebibytes) == (kept, peak)


def test_first_blocks_stay_plain_and_the_report_says_why() -> None:
    report = rewire(slowfast(block=InnerReluBottleneck))
    stages = {stage.name: stage for stage in report.stages}
    # A stage of one block, slow and fast, has nothing to rewire.
    assert {name: stage.rewired_blocks for name, stage in stages.items() if stage.rewired_blocks} == {
        f"{speed}_path.layer{index}": blocks for speed in ("slow", "fast") for index, blocks in ((2, 2), (3, 1), (4, 1))
    }
    assert stages["slow_path.layer2"].left_alone == ("0: it changes width or resolution (downsampling)",)
    laterals = "conv1_lateral, slow_path.layer1_lateral, slow_path.layer2_lateral, slow_path.layer3_lateral"
    assert report.outside == (
        "slow_path.conv1, fast_path.conv1: no residual blocks",
        f"slow_path.{laterals}: they lead from the fast pathway to the slow one (lateral)",
    )


def test_whole_blocks_in_pairs_are_exactly_the_pretrained_network() -> None:
    plain, faithful = slowfast().double().eval(), slowfast().double().eval()
    rewire(faithful, config=RewiringConfig(unit="block", merge="extrapolate", segment=2))
    frames, mask = clip()
    with torch.no_grad():
        expected, values = (network(frames.double(), mask).values for network in (plain, faithful))
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("unit", "kind"), [("branch", InnerReluBottleneck), ("block", Bottleneck)])
def test_relu_moves_only_where_branches_are_rewired(unit: str, kind: type[Bottleneck]) -> None:
    network = build_backbone(BackboneConfig(name="slowfast_nano", unit=unit))
    assert {type(module) for module in network.modules() if isinstance(module, Bottleneck)} == {kind}
    plain = build_backbone(BackboneConfig(name="slowfast_nano", rewired=False, unit=unit))
    assert {type(module) for module in plain.modules() if isinstance(module, Bottleneck)} == {Bottleneck}


@pytest.mark.parametrize("layout", KEY_LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("prefix", ["", "backbone.model.backbone."])
def test_every_layout_comes_back_as_it_was_written(tmp_path, layout, prefix: str) -> None:
    lateral_norm = layout.name == "pytorchvideo"
    source, target = slowfast(lateral_norm=lateral_norm), slowfast(lateral_norm=lateral_norm, seed=1)
    head = {
        prefix + {"pytorchvideo": "blocks.6.proj"}.get(layout.name, "cls_head.fc_cls") + ".weight": torch.ones(5, 320)
    }
    state = {prefix + key: value for key, value in export_state(source, layout=layout).items()}
    save_file(state | head, tmp_path / "weights.safetensors")
    report = load_weights(target, tmp_path / "weights.safetensors", layouts=KEY_LAYOUTS)
    assert (report.layout, report.prefix, report.ignored) == (layout.name, prefix, tuple(head))
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in source.state_dict().items())


def test_layouts_name_entries_as_their_code_bases_do() -> None:
    network = slowfast(lateral_norm=True)
    exported = {layout.name: set(export_state(network, layout=layout)) for layout in KEY_LAYOUTS}
    assert {
        "slow_path.layer1.0.downsample.conv.weight",
        "fast_path.layer2.1.conv3.bn.running_var",
        "slow_path.layer3_lateral.conv.weight",
    } <= exported["mmaction2"]
    assert {
        "slow_path.layer1.blocks.0.downsample.conv.weight",
        "slow_path.layer1.blocks.0.Fm.conv2.conv.weight",
        "fast_path.layer2.blocks.1.inv_block.Fm.conv3.bn.running_var",
        "slow_path.layer3_lateral.conv.weight",
    } <= exported["OpenTAD Re2SlowFast"]
    assert {
        "blocks.0.multipathway_blocks.1.norm.num_batches_tracked",
        "blocks.0.multipathway_fusion.conv_fast_to_slow.weight",
        "blocks.1.multipathway_blocks.0.res_blocks.0.branch1_conv.weight",
        "blocks.1.multipathway_blocks.0.res_blocks.0.branch1_norm.bias",
        "blocks.2.multipathway_blocks.1.res_blocks.1.branch2.norm_c.running_var",
        "blocks.3.multipathway_fusion.norm.weight",
    } <= exported["pytorchvideo"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slow_stride": 6}, "slow_stride 6 must be a multiple of speed_ratio 4 and of frames_per_step 2"),
        ({"frames_per_step": 3}, "slow_stride 4 must be a multiple of speed_ratio 4 and of frames_per_step 3"),
        ({"base_channels": 10}, "base_channels 10 do not divide by channel_ratio 4"),
    ],
)
def test_rates_and_widths_that_do_not_divide_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slowfast(**settings)


def test_drop_path_is_refused_because_there_is_none() -> None:
    with pytest.raises(ValueError, match=r"slowfast_nano has no drop-path, but backbone\.drop_path is 0\.1"):
        build_backbone(BackboneConfig(name="slowfast_nano", drop_path=0.1))


def test_frames_per_step_is_refused_where_the_family_offers_no_choice() -> None:
    with pytest.raises(ValueError, match=r"swin3d_nano gives a step per 2 frames, but backbone\.frames_per_step is 4"):
        build_backbone(BackboneConfig(name="swin3d_nano", frames_per_step=4))
