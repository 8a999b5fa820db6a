"""Keeps the states that a run saves in host memory between its forward and its backward.

    forward     when run k ends, copy its states to the host while the layers behind it compute
    backward    when run k needs its states, prefetch those of run k - 1 while run k computes

On CUDA, copies go through pinned memory on a separate stream. Streams wait for each other; the host never waits. A
state is late only if its transfer takes longer than the layers in between. Torch keeps pinned blocks for the next step,
rounded up to powers of two. On other devices, and on fake tensors, copies are plain ones. On a CPU they save nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks


@contextmanager
def offloaded(x: Tensor) -> Iterator[None]:
    """Inside, autograd saves tensors in host memory. Enter it around one reversible run, whose input is `x`.

    Values are the same to the last bit. If backward does not visit runs in the reverse order of forward, states arrive
    too late, or earlier than needed, but they are right.
    """
    run = _KeptRun(x)
    with saved_tensors_hooks(run.keep, lambda fetch: fetch()):
        yield


class _KeptRun:
    """The states of one run, and a link to the run before it. Autograd's graph holds it, through the states' hooks."""

    def __init__(self, x: Tensor) -> None:
        self._lane = _lane(x.device)
        self._input = x.untyped_storage()._cdata
        self._hosts: list[Tensor] = []
        self._arriving: dict[int, _Arrival] | None = None
        self._earlier: Callable[[], _KeptRun | None] = lambda: None

    def keep(self, state: Tensor) -> Callable[[], Tensor]:
        """Copies a state to the host. The function returned fetches it."""
        if not self._hosts:
            # Weak: a run whose graph is dropped without a backward must not stay for the next one's sake.
            self._earlier, self._lane.last_kept = self._lane.last_kept, weakref.ref(self)
        # The caller may write to the run's input right after forward, so its stream must wait for the copy.
        owned = state.untyped_storage()._cdata != self._input
        self._hosts.append(self._lane.send(state, wait=not owned))
        return partial(self._fetch, len(self._hosts) - 1)

    def _fetch(self, index: int) -> Tensor:
        """The state on its device, in a buffer that the caller may overwrite."""
        self._set_out()
        if (earlier := self._earlier()) is not None:
            earlier._set_out()
        assert self._arriving is not None
        # Taken out, because the caller may overwrite what it gets: if a state is fetched again, it is copied again.
        arrival = self._arriving.pop(index, None) or self._lane.bring(self._hosts[index])
        return self._lane.received(arrival)

    def _set_out(self) -> None:
        if self._arriving is None:
            self._arriving = {index: self._lane.bring(host) for index, host in enumerate(self._hosts)}


class _Arrival(NamedTuple):
    """A tensor on the device, and the event after which its copy is complete."""

    state: Tensor
    complete: torch.cuda.Event | None


class _Lane:
    """Copies between one device and the host, one after another on a stream."""

    def __init__(self, device: torch.device) -> None:
        self.last_kept: Callable[[], _KeptRun | None] = lambda: None
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, state: Tensor, *, wait: bool) -> Tensor:
        """Starts a copy to the host. With `wait`, work that the caller's stream gets later waits for it."""
        if self._stream is None or isinstance(state, FakeTensor):
            return state.to("cpu", copy=True)
        current = torch.cuda.current_stream(self._device)
        host = torch.empty_like(state, device="cpu", pin_memory=True)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            host.copy_(state, non_blocking=True)
        # The allocator must not reuse the state's memory before the copy is complete.
        state.record_stream(self._stream)
        if wait:
            current.wait_stream(self._stream)
        return host

    def bring(self, host: Tensor) -> _Arrival:
        """Starts a copy to the device."""
        if self._stream is None or isinstance(host, FakeTensor):
            return _Arrival(host.to(self._device, copy=True), None)
        # The memory comes from the caller's stream, which may still use what was there before.
        state = torch.empty_like(host, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            state.copy_(host, non_blocking=True)
            complete = self._stream.record_event()
        # For a backward that fails and frees the state before it has arrived.
        state.record_stream(self._stream)
        return _Arrival(state, complete)

    def received(self, arrival: _Arrival) -> Tensor:
        """The state; the caller's stream waits until it is complete."""
        if arrival.complete is not None:
            torch.cuda.current_stream(self._device).wait_event(arrival.complete)
        return arrival.state


@cache
def _lane(device: torch.device) -> _Lane:
    """One per device and process, so that each run finds the one before it."""
    return _Lane(device)
