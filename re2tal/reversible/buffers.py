"""Buffers that branches write: saved before a branch runs, restored before it runs again.

Buffers that training writes, such as the running statistics of a normalisation, must not be updated a second time. A
branch that reads what it writes must find the values that it found the first time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm


@dataclass(frozen=True, slots=True, eq=False)
class SavedBuffer:
    """A buffer of a module, and the values that it had."""

    module: nn.Module
    name: str
    buffer: Tensor
    values: Tensor
    version: int

    def restore(self) -> None:
        """The values into the buffer, and the buffer into its place."""
        with torch.no_grad():
            self.buffer.copy_(self.values)
        self.module._buffers[self.name] = self.buffer

    def was_written(self) -> bool:
        """Whether the buffer was exchanged, or written in a way that counts a version."""
        found = self.module._buffers.get(self.name)
        return found is not None and (found is not self.buffer or found._version != self.version)

    def differs(self) -> bool:
        """Whether the module has other values now. A buffer that is gone was no state."""
        found = self.module._buffers.get(self.name)
        if found is None:
            return False
        return found.shape != self.values.shape or not torch.equal(found, self.values)


def save_buffers(module: nn.Module) -> list[SavedBuffer]:
    """Those of `module` itself, not of modules inside."""
    own = ((name, buffer) for name, buffer in module._buffers.items() if buffer is not None)
    return [SavedBuffer(module, name, buffer, buffer.clone(), buffer._version) for name, buffer in own]


_Writing = Literal["no", "counted", "uncounted"]
_writing: WeakKeyDictionary[nn.Module, dict[bool, _Writing]] = WeakKeyDictionary()
"""Module -> training -> whether its forward writes buffers, and whether their versions count it (those of `.data` do
not). Found in the first forward of a mode."""


class BufferWatch:
    """Finds the buffers of a module that a forward writes, and saves those that it may have read before.

    Statistics of a BatchNorm in training are written and not read. Any other module that writes its buffers may also
    read them, as spectral norm and codebooks do: it runs again from the values that it had.
    """

    def __init__(self, owner: nn.Module | None) -> None:
        modules = [] if owner is None else [module for module in owner.modules() if module._buffers]
        self._versions = [
            (module, [(one, one._version) for one in module.buffers(recurse=False)]) for module in modules
        ]
        others = [module for module in modules if not is_statistics(module)]
        known = {module: _writing.get(module, {}).get(module.training) for module in others}
        self._writers = {module: how for module, how in known.items() if how in ("counted", "uncounted")}
        self._readers = {module for module, how in known.items() if how == "no"}
        self._first = [
            one for module, how in known.items() if how is None and not _is_fake(module) for one in save_buffers(module)
        ]
        statistics = [module for module in modules if is_statistics(module)] if self._first else []
        self._statistics = [one for module in statistics for one in save_buffers(module)]

    @property
    def is_first(self) -> bool:
        """Whether it is still to be found what some modules write."""
        return bool(self._first)

    def find_writers(self) -> list[SavedBuffer]:
        """After a first forward: what modules that write their buffers had in them before."""
        writers: list[SavedBuffer] = []
        for module in dict.fromkeys(one.module for one in self._first):
            own = [one for one in self._first if one.module is module]
            changed = [one for one in own if one.was_written() or one.differs()]
            counted = all(one.was_written() for one in changed)
            how: _Writing = "no" if not changed else "counted" if counted else "uncounted"
            _writing.setdefault(module, {})[module.training] = how
            writers += own if changed else []
        return writers

    def statistics(self) -> list[SavedBuffer]:
        """What statistics were before a first forward, which a second one would write once more."""
        return self._statistics

    def save(self) -> list[SavedBuffer]:
        """The buffers of the modules that are known to write theirs."""
        return [one for module in self._writers for one in save_buffers(module)]

    def changed_since(self, saved: Sequence[SavedBuffer]) -> list[SavedBuffer]:
        """Those of `saved` that were written since, or may have been."""
        return [one for one in saved if one.was_written() or self._writers[one.module] == "uncounted"]

    def changed_modules(self) -> list[nn.Module]:
        """Modules of which a buffer was written since the watch was made.

        Of a BatchNorm only `num_batches_tracked` shows it: its kernel writes the statistics without counting a version.
        """
        now = [(module, [(one, one._version) for one in module.buffers(recurse=False)]) for module, _ in self._versions]
        changed = [
            module
            for (module, before), (_, after) in zip(self._versions, now, strict=True)
            if len(before) == len(after)
            and any(a is not b or v != w for (a, v), (b, w) in zip(before, after, strict=True))
        ]
        for module in changed:
            if module in self._readers:
                raise RuntimeError(
                    f"a {type(module).__name__} wrote its buffers now, but not in its first forward, so that they were "
                    "not saved and backward could not run it again as it ran; set recompute=False"
                )
        return list(dict.fromkeys([*changed, *self._writers]))


def _is_fake(module: nn.Module) -> bool:
    """Whether only bytes are counted, to which copies would add."""
    return any(isinstance(buffer, FakeTensor) for buffer in module.buffers(recurse=False))


def is_statistics(module: nn.Module) -> bool:
    """Whether it writes its buffers in training only, and reads them in evaluation only."""
    return isinstance(module, _NormBase) and type(module).forward in _STATISTICS


_STATISTICS = {kind.forward for kind in (_BatchNorm, _InstanceNorm, nn.SyncBatchNorm)}


@contextmanager
def buffers_restored(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restores the buffers of `modules` to their present values at the end."""
    before = [saved for module in modules for saved in save_buffers(module)]
    try:
        yield
    finally:
        for saved in before:
            saved.restore()
