"""The context that a replayed branch must see, besides its input, random draws and buffers.

Backward runs a branch under the autocast state, in the modes and with the kernels of its forward, wherever and whenever
`backward` is called. Parameters and buffers that are others by then are an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from re2tal.reversible.attributes import Attributes
from re2tal.reversible.buffers import is_statistics


@dataclass(frozen=True, slots=True)
class AutocastState:
    """Whether autocast is on for a device type and for the CPU, and its dtypes."""

    enabled: tuple[tuple[str, torch.dtype, bool], ...]
    """(device type, dtype, on)"""

    @classmethod
    def now(cls, device: torch.device) -> AutocastState:
        """The present state."""
        kinds = dict.fromkeys((device.type, "cpu"))
        return cls(tuple((kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds))

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, autocast is as it was recorded.

        Its cache of cast weights is off. A branch uses each weight once, and if two branches shared one, the second
        would find it in the cache with the graph of the first, which is freed already.
        """
        with ExitStack() as stack:
            for kind, dtype, enabled in self.enabled:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield


_PLAIN = (Tensor, nn.Parameter)


class ModuleState:
    """The modules that branches use, as forward found them: their modes, parameters, buffers and plain attributes."""

    def __init__(self, owner: nn.Module | None) -> None:
        self._owner = owner
        self.attributes = Attributes(owner)
        self._modes = [] if owner is None else [(module, module.training) for module in owner.modules()]
        self._parameters: dict[str, tuple[Tensor, bool, tuple[int, int] | None]] = dict(self._now())
        self._buffers = self._buffers_now()
        self.is_trained = owner is None or any(wanted for _, wanted, _ in self._parameters.values())

    def _now(self) -> Iterator[tuple[str, tuple[Tensor, bool, tuple[int, int]]]]:
        for name, one in () if self._owner is None else self._owner.named_parameters():
            counts = not is_lazy(one) and not one.is_inference()
            # ZeRO-3 exchanges what `.data` is whenever it gathers a parameter, and FSDP holds no plain ones.
            stays = counts and type(one) in _PLAIN and not hasattr(one, "ds_id")
            storage = one.untyped_storage()._cdata if stays else 0
            yield name, (one, one.requires_grad, (one._version if counts else 0, storage))

    def parameters(self) -> list[Tensor]:
        """As forward found them."""
        return [one for one, _, _ in self._parameters.values()]

    def _buffers_now(self) -> dict[tuple[nn.Module, str], tuple[Tensor | None, int]]:
        """Without statistics in training, where they are not read."""
        modules = [module for module, training in self._modes if not (training and is_statistics(module))]
        return {(module, name): _with_version(one) for module in modules for name, one in module._buffers.items()}

    def ran(self, *, writers: Collection[nn.Module] = ()) -> None:
        """After forward. What branches write themselves (a weight that they clamp, one made lazily), they write again:
        its version says nothing. Nor do those of the buffers of a module that writes any, as `writers` do in ways that
        count no version.
        """
        found, now = self._buffers, self._buffers_now()
        written = {key[0] for key, one in now.items() if not _is_same(found.get(key, (None, 0)), one)}
        self._buffers = {key: one for key, one in now.items() if key[0] not in written.union(writers)}
        before = self._parameters
        self._parameters = {
            name: (one, wanted, version if name in before and before[name][2] == version else None)
            for name, (one, wanted, version) in self._now()
        }
        self.attributes.ran()

    def check(self) -> None:
        """Raises RuntimeError where backward would differentiate other branches than forward ran.

        FSDP exchanges sharded parameters, of a type of their own, for whole ones.
        """
        for name, (now, wanted_now, version_now) in self._now():
            before, wanted, version = self._parameters.get(name, (now, wanted_now, None))
            if wanted != wanted_now:
                change = f"requires_grad was {wanted}, and is {wanted_now}"
            elif before is now and version not in (None, version_now):
                change = "it was written to in place, or has other data: an optimizer's step, load_state_dict?"
            elif before is not now and type(before) in _PLAIN and type(now) in _PLAIN:
                change = "it is another tensor: functional_call?"
            else:
                continue
            raise RuntimeError(_CHANGED.format(what=f"{name}, a parameter", change=change))
        for (module, name), was in self._buffers.items():
            found = _with_version(module._buffers.get(name))
            if not _is_same(was, found):
                change = "it was written to in place" if found[0] is was[0] else "it is another tensor"
                what = f"{name} of a {type(module).__name__}, a buffer"
                raise RuntimeError(_CHANGED.format(what=what, change=change))
        for what, change in self.attributes.changes():
            raise RuntimeError(_CHANGED.format(what=what, change=change))

    @contextmanager
    def as_in_forward(self) -> Iterator[None]:
        """Behind `check`. Inside, modules are in the modes of forward, whatever `train` and `eval` have done since, and
        have its numbers, flags and names."""
        changed = [(module, mode) for module, mode in self._modes if module.training != mode]
        for module, mode in changed:
            module.training = mode  # not `train(mode)`, which sets all modules inside as well
        try:
            with self.attributes.put_back():
                yield
        finally:
            for module, mode in changed:
                module.training = not mode


def _with_version(one: Tensor | None) -> tuple[Tensor | None, int]:
    return one, 0 if one is None or one.is_inference() else one._version


def _is_same(one: tuple[Tensor | None, int], other: tuple[Tensor | None, int]) -> bool:
    return one[0] is other[0] and one[1] == other[1]


_CHANGED = (
    "{what} of a reversible run, of a layer between two, or of clips in groups, has changed between forward and "
    "backward ({change}), and what runs again in backward would find it as it is now; call backward before, or run "
    "with recompute=False and without backbone.clips_at_once"
)


AttentionKernels = tuple[bool, ...]
"""Whether the flash, the memory-efficient and the plain kernel of attention may be chosen."""


def attention_kernels() -> AttentionKernels:
    """As `torch.nn.attention.sdpa_kernel` allows them now. It may end before backward."""
    allowed = torch.backends.cuda
    return allowed.flash_sdp_enabled(), allowed.mem_efficient_sdp_enabled(), allowed.math_sdp_enabled()


def _allow(kernels: AttentionKernels) -> None:
    allowed = torch.backends.cuda
    for enable, on in zip(
        (allowed.enable_flash_sdp, allowed.enable_mem_efficient_sdp, allowed.enable_math_sdp), kernels, strict=True
    ):
        enable(on)


@contextmanager
def same_kernels(attention: AttentionKernels | None = None) -> Iterator[None]:
    """Inside, kernels are not chosen by whether a gradient is wanted: the replay wants one, the forward does not.

    cuDNN's attention has different plans for inference and training. `nn.MultiheadAttention` and
    `nn.TransformerEncoderLayer` have a fast path for inference. Other kernels are chosen by shapes, dtypes and flags,
    which are the same both times. One is not: on a CPU, attention with a mask that wants a gradient has a kernel of its
    own, which no flag chooses for the forward. Under bfloat16 its rounding differs. Nor are they chosen by what was
    fastest: `cudnn.benchmark` measures in each thread anew, and on a GPU autograd runs backward in threads of its own.

    `attention`: the kernels that forward could choose from, where this is backward.
    """
    cudnn, fast_path = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    measured, others = torch.backends.cudnn.benchmark, attention_kernels()
    _allow(attention or others)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = measured
        _allow(others)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch.backends.mha.set_fastpath_enabled(fast_path)
