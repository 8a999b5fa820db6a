"""One backbone in all the forms that the benchmarks compare, with the same parameters in each.

    plain                 autograd keeps everything
    checkpoint            torch.utils.checkpoint around every residual block, non-reentrant, early stop
    keep attention        the same, but what attention gives is kept: selective checkpointing
    checkpoint, on host   as `checkpoint`, with the inputs of blocks in host memory: save_on_cpu
    family's own          the gradient checkpointing of transformers' models; Swin and SlowFast are ours and have none
    reversible            rewired, one branch at a time
    in pieces             rewired, one piece of a branch at a time; by stage as many branches known, and blocks that are
                          not residual kept, as suits the video
    pieces, known         the same, all MLPs known: none is run to its last linear layer again
    pieces, attention     as `in pieces`, and what attention kernels return is saved: none of them is run again
    pieces, both          both

Networks that are not rewired compute another function at the same cost. SlowFast's normalisation stays in evaluation
mode in all forms, as its recipes have it and pieces need it.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.planning.options import SAVING_ATTENTION
from re2tal.planning.settings import Setting, configure, outputs_worth_saving
from re2tal.reversible.fake import on_fake_tensors
from re2tal.reversible.live_bytes import LiveBytes
from re2tal.reversible.precision import GridStep
from re2tal.rewire import RewiringConfig, residual_branches, rewire, stages_of, unrewire

CUT = ("in pieces", "pieces, known", "pieces, attention", "pieces, both")
FORMS = ("plain", "checkpoint", "keep attention", "checkpoint, on host", "family's own", "reversible", *CUT)

ATTENTION_KERNELS = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default
    for kernel in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
}

Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """What a backbone is measured on: one video."""

    frames: int
    size: int
    """Rows, and columns, of pixels."""
    chunk_mebibytes: float
    """The budget of a piece."""
    known: int | tuple[int, ...] = 0
    """How many branches of each run keep what they added, in pieces; or of each run of a stage, for all stages in the
    order in which the network holds them."""
    keep_nonresidual: bool | tuple[bool, ...] = False
    """Whether blocks that are not residual keep their activations, in pieces; or by stage, in the same order."""

    def settings(self, num_stages: int, *, recompute: bool = True) -> list[Setting]:
        """Of the stages, in pieces."""
        of_known, of_kept = (
            value if isinstance(value, tuple) else (value,) * num_stages
            for value in (self.known, self.keep_nonresidual)
        )
        return [
            Setting(0 if recompute else None, self.chunk_mebibytes, known=known, keep_nonresidual=kept)
            for known, kept in zip(of_known, of_kept, strict=True)
        ]

    def __str__(self) -> str:
        pieces = f"pieces of {self.chunk_mebibytes:g} MiB, {self.known} known"
        kept = self.keep_nonresidual
        stages = [str(number) for number, one in enumerate(kept) if one] if isinstance(kept, tuple) else ["all"] * kept
        others = f", non-residual blocks of stages {', '.join(stages)} kept" if stages else ""
        return f"{self.frames} frames of {self.size} x {self.size}, {pieces}{others}"


class Network:
    """A backbone with random weights, of which every form has the same parameters."""

    def __init__(self, name: str, *, device: torch.device, predicted: bool = False) -> None:
        """If `predicted`, tensors have shapes and no numbers, and steps are to be run under `mode`."""
        torch.manual_seed(0)
        self.predicted = predicted
        self.mode: AbstractContextManager = nullcontext()
        self._device = device
        norm_eval = name.startswith("slowfast")
        # A family may prepare its blocks for being rewired.
        configs = [BackboneConfig(name=name, rewired=rewired, norm_eval=norm_eval) for rewired in (False, True)]
        if predicted:
            fakes = [
                on_fake_tensors(partial(build_backbone, each), dtype=torch.float32, device=device) for each in configs
            ]
            (self._plain, self.mode), (self._prepared, _) = fakes
        else:
            self._plain, self._prepared = (build_backbone(each).to(device) for each in configs)
        unrewire(self._prepared)
        if norm_eval and not predicted:
            _calibrate(self._plain, device)
        for path, module in self._plain.named_modules():
            twin = self._prepared.get_submodule(path)
            twin._parameters.update(module._parameters)
            twin._buffers.update(module._buffers)
        self.parameters = [parameter for parameter in self._plain.parameters() if parameter.requires_grad]
        _give_gradients(self._plain)

    def step(self, form: str, case: Case, *, autocast: bool = False, **options: Any) -> Step | None:
        """A step of `form`, which takes `options`; None where a family has no such form."""
        backbone = self.form(form, case, **options)
        return None if backbone is None else self.step_of(backbone, form, case, autocast=autocast)

    def step_of(self, backbone: nn.Module, form: str, case: Case, *, autocast: bool = False) -> Step:
        """A forward and a backward, into gradients that are there already; `autocast` is to bfloat16."""
        generator = torch.Generator().manual_seed(1)
        with self.mode:
            frames = torch.randn(1, 3, case.frames, case.size, case.size, generator=generator).to(self._device)
            mask = torch.ones(1, case.frames, dtype=torch.bool, device=self._device)
        on_host = form == "checkpoint, on host"

        def step() -> None:
            saved = save_on_cpu(pin_memory=self._device.type == "cuda") if on_host else nullcontext()
            with saved, torch.autocast(self._device.type, torch.bfloat16, enabled=autocast):
                values = backbone(frames, mask).values
            values.float().square().mean().backward()

        return step

    def form(
        self,
        form: str,
        case: Case,
        *,
        doubled: str | None = None,
        recompute: bool = True,
        grid: GridStep = "auto",
        offload: bool = False,
    ) -> nn.Module | None:
        """The backbone in one of FORMS, with the parameters of all others; None where a family has no such form.

        `doubled` is a stage that gets twice as many blocks; `offload` keeps states of rewired runs in host memory.
        """
        rewired = form in ("reversible", *CUT)
        source = self._prepared if rewired else self._plain
        backbone = copy.deepcopy(source, {id(value): value for value in (*source.parameters(), *source.buffers())})
        if doubled is not None:
            _double(backbone.get_submodule(doubled))
        if rewired:
            rewire(backbone, config=RewiringConfig(recompute=recompute, grid=grid))
            stages = stages_of(backbone)
            if form in CUT:
                known = outputs_worth_saving(stages) if form in ("pieces, known", "pieces, both") else case.known
                saved = SAVING_ATTENTION.saved_attention if form in ("pieces, attention", "pieces, both") else 0
                settings = replace(case, known=known).settings(len(stages), recompute=recompute)
                configure(stages, [replace(setting, saved_attention=saved) for setting in settings])
            for stage in stages.values() if offload else ():
                stage.config = replace(stage.config, offload=True)
        elif form == "family's own":
            return backbone if _checkpoint_by_library(backbone) else None
        elif form == "keep attention":
            keep = partial(create_selective_checkpoint_contexts, _keep_attention)
            return backbone if checkpoint_blocks(backbone, "attention", context_fn=keep) else None
        elif form != "plain":
            checkpoint_blocks(backbone)
        return backbone


def _calibrate(backbone: nn.Module, device: torch.device) -> None:
    """Statistics of noise for norms that never saw data, without which values would grow from block to block."""
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm3d)]
    for norm in norms:
        norm.momentum, norm.training = 1.0, True
    with torch.no_grad():
        backbone(torch.randn(1, 3, 64, 112, 112, device=device), torch.ones(1, 64, dtype=torch.bool, device=device))
    for norm in norms:
        norm.momentum, norm.training = 0.1, False


def _give_gradients(module: nn.Module) -> None:
    """They are no activations, and are there before the first step so that they do not count."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _double(stage: nn.Module) -> None:
    assert isinstance(stage, nn.Sequential | nn.ModuleList)
    blocks = [block for block in stage if residual_branches(block)]
    values = [value for block in blocks for value in (*block.parameters(), *block.buffers())]
    stage.extend(copy.deepcopy(blocks, {id(value): _cloned(value) for value in values}))
    _give_gradients(stage)


def _cloned(value: Tensor) -> Tensor:
    clone = value.detach().clone()
    return nn.Parameter(clone, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else clone


def checkpoint_blocks(backbone: nn.Module, having: str = "", **options: Any) -> bool:
    """Every residual block that has a branch with `having` in its name; False if there is none."""
    blocks = [
        module for module in backbone.modules() if any(having in branch.name for branch in residual_branches(module))
    ]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
    return bool(blocks)


def _keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What attention gives, whether a kernel computes it or a product of (tokens, tokens) with (tokens, channels)."""
    if operation in ATTENTION_KERNELS:
        return CheckpointPolicy.MUST_SAVE
    is_mixing = operation is torch.ops.aten.bmm.default and args[0].shape[-1] > args[1].shape[-1]
    return CheckpointPolicy.MUST_SAVE if is_mixing else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpoint_by_library(backbone: nn.Module) -> bool:
    for module in backbone.modules():
        for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):  # transformers renames it
            if hasattr(module, name):
                getattr(module, name)({"use_reentrant": False})
                return True
    return False


def peak_bytes(step: Step, device: torch.device) -> int:
    """Of one step, beyond what was there before it."""
    gc.collect()
    if device.type == "cuda":
        step()  # libraries take their workspaces with the first step
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        step()
    return live.peak


def resident_bytes(step: Step) -> int:
    """The most that this process held of the machine's memory during one step, beyond what it held before: Linux's."""
    step()  # libraries keep what they prepare for its shapes
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else the step fills what earlier ones left
    status = Path("/proc/self/status")

    def kibibytes(key: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kibibytes("VmRSS")
    step()
    return 1024 * (kibibytes("VmHWM") - before)


def seconds(step: Step, device: torch.device) -> float:
    """Of one step."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def rounds(
    steps: Mapping[str, Step], device: torch.device, *, num: int, warm: bool = False
) -> Iterator[dict[str, float]]:
    """Seconds of every step, all in turn in every round, the other way round in every second one, after a first round
    that does not count; `warm` if each has run before."""
    names = list(steps)
    for number in range(1 if warm else 0, num + 1):
        names.reverse()
        found = {name: seconds(steps[name], device) for name in names}
        if number:
            yield found


def median_ratio(seconds: Sequence[Mapping[str, float]], form: str, base: str) -> float:
    """Of what was timed in the same round."""
    return statistics.median(each[form] / each[base] for each in seconds)
