"""What is counted on fake tensors is what the same step needs when it is run."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from planning.peaks import peak_of
from planning.small import small_run
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.config import build_detector
from re2tal.planning.dry_run import DryRun, marking
from re2tal.planning.footprint import kept_bytes_of
from re2tal.planning.search import Option
from re2tal.planning.settings import Setting, configure
from re2tal.reversible.live_bytes import LiveBytes
from re2tal.rewire import stages_of
from re2tal.training.frames import prepare_frames

CPU = torch.device("cpu")
SETTINGS = {
    "stored": Setting(None, None),
    "rebuilt": Setting(0, None),
    "in pieces": Setting(0, 0.25),
    "half stored": Setting(2, 0.25),
}


@pytest.fixture(scope="module")
def dry_run() -> DryRun:
    return DryRun(small_run(), device=CPU, num_classes=4, free_gradients=False)


def measured_peak(setting: Setting) -> int:
    """Of the second step of the real detector."""
    run = small_run()
    detector = build_detector(run, ["a", "b", "c", "d"])
    configure(stages_of(detector.backbone), [setting] * 3)
    mask = torch.ones(2, 16, dtype=torch.bool)
    for _ in range(2):
        detector.zero_grad()
        gc.collect()
        with LiveBytes() as live:
            frames = torch.zeros(2, 3, 16, 48, 48, dtype=torch.uint8)
            strength = run.data.clips.colour_jitter
            pixels = prepare_frames(frames, strength=strength, generator=torch.Generator(), dtype=torch.float32)
            outputs = detector(pixels, mask)
            del pixels
            torch.stack([leaf.square().sum() for leaf in tree_leaves(outputs) if leaf.requires_grad]).sum().backward()
    return live.peak


@pytest.mark.parametrize(
    "name",
    ["rebuilt", "half stored", *(pytest.param(name, marks=pytest.mark.slow) for name in ("stored", "in pieces"))],
)
def test_the_peak_is_the_measured_one(name, dry_run) -> None:
    configure(dry_run.stages(), [SETTINGS[name]] * 3)
    trace = dry_run.trace()
    assert trace.peak == pytest.approx(measured_peak(SETTINGS[name]), rel=0.02)
    assert trace.prepared_again == 4 * 2 * 3 * 16 * 48 * 48


def test_phases_add_up_to_the_peaks_of_mixed_settings(dry_run) -> None:
    """What each stage does with all set alike says what they do together."""
    traces = {}
    for name in ("stored", "rebuilt", "in pieces"):
        configure(dry_run.stages(), [SETTINGS[name]] * 3)
        traces[name] = dry_run.trace()
    for mixed in (["in pieces", "rebuilt", "stored"], ["stored", "stored", "in pieces"]):
        options = []
        for s, name in enumerate(mixed):
            forward, backward = (traces[name].of(kind)[s] for kind in ("forward", "backward"))
            kept = traces[name].kept()[s]
            options.append(Option(0, kept, forward.peak - forward.live, backward.peak - backward.live))
        configure(dry_run.stages(), [SETTINGS[name] for name in mixed])
        assert peak_of(traces["rebuilt"].ground(), options) == pytest.approx(dry_run.trace().peak, rel=0.02)


def test_a_network_of_the_transformers_library_with_drop_path_is_built_without_numbers() -> None:
    run = replace(small_run(), backbone=BackboneConfig(name="videomae_nano", drop_path=0.1))
    dry_run = DryRun(run, device=CPU, num_classes=4, free_gradients=False)
    assert len(dry_run.stages()) == 1
    assert all(isinstance(parameter, FakeTensor) for parameter in dry_run.network.parameters())


@pytest.mark.gpu
def test_states_on_the_host_are_not_on_the_device() -> None:
    """Nothing of a rewired stage's run stays on the card between its forward and its backward."""
    run = small_run()
    dry_run = DryRun(run, device=torch.device("cuda"), num_classes=4, free_gradients=False)
    traces = {}
    for offload in (False, True):
        configure(dry_run.stages(), [Setting(0, None, offload=offload)] * 3)
        traces[offload] = dry_run.trace()
    saved = sum(traces[False].kept()) - sum(traces[True].kept())
    assert saved > 0
    assert traces[True].host - traces[False].host >= saved


def test_a_plain_backbone_is_one_stage_that_keeps_what_autograd_saves() -> None:
    run = replace(small_run(), backbone=BackboneConfig(name="swin3d_nano", rewired=False))
    plain = DryRun(run, device=CPU, num_classes=4, free_gradients=False)
    trace = plain.trace()
    assert plain.stages() == {}
    assert [phase.event.kind for phase in trace.phases] == ["start", "forward", "between", "backward"]
    # Counted in another way: every storage that autograd saves; the clips themselves are in the batch already.
    clips = 4 * 2 * 3 * 16 * 48 * 48
    saved = kept_bytes_of(
        build_backbone(run.backbone),
        lambda: (torch.zeros(2, 3, 16, 48, 48), torch.ones(2, 16, dtype=torch.bool)),
    )
    assert trace.kept()[0] == pytest.approx(saved - clips, rel=0.01)


def test_a_stage_of_two_outputs_begins_its_backward_once():
    class Pathways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slow, self.fast = nn.Linear(2, 2), nn.Linear(2, 3)

        def forward(self, pair):
            slow, fast = pair
            return self.slow(slow), self.fast(fast[..., :2])

    backbone = nn.Sequential(Pathways(), Pathways())
    seen: list[tuple[str, int]] = []
    with marking(backbone, list(backbone), lambda event: seen.append((event.kind, event.stage))):
        slow, fast = backbone((torch.ones(1, 2), torch.ones(1, 3)))
        (slow.sum() + fast.sum()).backward()
    assert seen == [("forward", 0), ("forward", 1), ("between", 0), ("backward", 1), ("backward", 0)]
