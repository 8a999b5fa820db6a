"""The states that a run keeps, in host memory between its forward and its backward.

    forward     run k ends               its states leave, while the layers behind it compute
    backward    run k wants its states   those of run k - 1, which backward comes to next, set out, while run k computes

On CUDA they go through pinned memory on a stream of their own, and streams wait for each other, never the host: a
state is late only where the link is slower than the layers in between. Torch keeps pinned blocks for the next step,
rounded up to powers of two. Elsewhere, and on fake tensors, copies are plain ones; on a CPU, whose memory is the
host's, they save nothing.
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
    """Inside, what autograd saves goes to host memory: enter it around one reversible run, of which `x` is the input.

    Values are the same to the last bit. Where backward meets runs in another order than forward's turned round, states
    arrive later, or earlier, than they could.
    """
    run = _KeptRun(x)
    with saved_tensors_hooks(run.keep, lambda fetch: fetch()):
        yield


class _KeptRun:
    """The states of one run, and the run that was kept before it; it lives as long as autograd's graph holds them."""

    def __init__(self, x: Tensor) -> None:
        self._lane = _lane(x.device)
        self._input = x.untyped_storage()._cdata
        self._hosts: list[Tensor] = []
        self._arriving: dict[int, _Arrival] | None = None
        self._earlier: Callable[[], _KeptRun | None] = lambda: None

    def keep(self, state: Tensor) -> Callable[[], Tensor]:
        """Copies a state out; what it returns fetches it."""
        if not self._hosts:
            self._earlier, self._lane.last_kept = self._lane.last_kept, weakref.ref(self)
        # What the run does not own may be written to by others, who must then wait for the copy.
        owned = state.untyped_storage()._cdata != self._input
        self._hosts.append(self._lane.send(state, wait=not owned))
        return partial(self._fetch, len(self._hosts) - 1)

    def _fetch(self, index: int) -> Tensor:
        """The state on its device, in a buffer that is the caller's."""
        self._set_out()
        if (earlier := self._earlier()) is not None:
            earlier._set_out()
        assert self._arriving is not None
        arrival = self._arriving.pop(index, None) or self._lane.bring(self._hosts[index])
        return self._lane.received(arrival)

    def _set_out(self) -> None:
        if self._arriving is None:
            self._arriving = {index: self._lane.bring(host) for index, host in enumerate(self._hosts)}


class _Arrival(NamedTuple):
    """A tensor on the device, and when it is complete."""

    state: Tensor
    complete: torch.cuda.Event | None


class _Lane:
    """The way between one device and the host: a stream on which copies go one after another."""

    def __init__(self, device: torch.device) -> None:
        self.last_kept: Callable[[], _KeptRun | None] = lambda: None
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, state: Tensor, *, wait: bool) -> Tensor:
        """A copy on the host, of which only the stream knows when it is complete; `wait` for it on the caller's."""
        if self._stream is None or isinstance(state, FakeTensor):
            return state.to("cpu", copy=True)
        current = torch.cuda.current_stream(self._device)
        host = torch.empty_like(state, device="cpu", pin_memory=True)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            host.copy_(state, non_blocking=True)
        state.record_stream(self._stream)  # its memory is not given to others before the copy is complete
        if wait:
            current.wait_stream(self._stream)
        return host

    def bring(self, host: Tensor) -> _Arrival:
        """Starts a copy to the device."""
        if self._stream is None or isinstance(host, FakeTensor):
            return _Arrival(host.to(self._device, copy=True), None)
        # From the memory of the caller's stream, which may still be at work on what was there before.
        state = torch.empty_like(host, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            state.copy_(host, non_blocking=True)
            complete = self._stream.record_event()
        state.record_stream(self._stream)
        return _Arrival(state, complete)

    def received(self, arrival: _Arrival) -> Tensor:
        """The state, for use on the caller's stream from now on."""
        if arrival.complete is not None:
            torch.cuda.current_stream(self._device).wait_event(arrival.complete)
        return arrival.state


@cache
def _lane(device: torch.device) -> _Lane:
    """One for all runs of a process, so that each finds the one before it."""
    return _Lane(device)
