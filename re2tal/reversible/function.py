"""The autograd Function of a run: forward records what backward needs, backward rebuilds states and differentiates.

Inside backward every branch gets a real, nested `backward()` that accumulates into the leaves, so that the hooks which
DDP and DeepSpeed put on modules and parameters see an ordinary backward. Parameters are no inputs of the Function,
because ZeRO-3 keeps them partitioned, hence empty, outside their modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from re2tal.reversible.buffers import BufferWatch, buffers_restored
from re2tal.reversible.differentiation import differentiate, differentiate_pieces, run_with_graph
from re2tal.reversible.first_parts import REMEDY, one_part_each, takes_first_parts
from re2tal.reversible.monitor import Observation
from re2tal.reversible.record import Graph, Recording
from re2tal.reversible.replay_context import ModuleState, attention_kernels, same_kernels
from re2tal.reversible.rng import GeneratorState
from re2tal.reversible.run import BranchFunction, Run


class ReversibleRun(torch.autograd.Function):
    """Inputs: x, an anchor that wants a gradient, the run, the owner of its parameters, an observation or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, run: Run, owner: nn.Module | None, observation: Observation | None
    ) -> Tensor:
        """Returns the output of the run, and leaves its last two states on the node, as `ends`."""
        # It only makes autograd record this node; see `_recomputed` in engine.py.
        del anchor
        ctx.modules, ctx.first_parts = ModuleState(owner), takes_first_parts()
        ctx.attention = attention_kernels()
        before = GeneratorState.now(x.device)
        watch = BufferWatch(owner)
        found = _run_forward(ctx, x, run, watch, observation)
        if watch.is_first and (writers := watch.find_writers()):
            # Branches that read what they write must be replayed from what they read, which was not saved, as nobody
            # knew. Known now, it is saved in a second forward, and in all that follow.
            for saved in [*writers, *watch.statistics()]:
                saved.restore()
            before.restore()
            found = _run_forward(ctx, x, run, BufferWatch(owner), observation)
        ctx.modules.ran(writers=ctx.changed_modules)
        start, previous, current, states = found
        # Saved, not kept as attributes: autograd then notices writes to x, and hooks on saved tensors see the states.
        ctx.save_for_backward(*states)
        ctx.ends = previous, current
        return run.merged(start, previous, current)

    # From torch 2.12 on, gradients then come in a list that backward can empty. Autograd would otherwise hold the
    # output's gradient, as large as a state, until backward returns.
    boxed_grads_call = True

    @staticmethod
    @torch._disable_dynamo
    def backward(ctx: Any, gradients: list[Tensor] | Tensor) -> tuple[Tensor | None, None, None, None, None]:
        """Returns the gradient of x. Raises RuntimeError for what needs activations that are gone."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a reversible run forgets its activations, so it has no second derivatives: backward was called with "
                "create_graph=True; call it without, or run with recompute=False"
            )
        # Autograd itself allows a second backward under retain_graph=True, but the first one rebuilt states in the
        # buffers of the saved ones.
        if ctx.spent:
            raise RuntimeError(
                "backward went through a reversible run twice, but the first time consumed its states; add the losses "
                "and call backward once, or run with recompute=False"
            )
        ctx.spent = True
        ctx.modules.check()
        # Input 1 is the anchor, which nobody outside can name: the engine executes its node only if backward() goes to
        # all leaves.
        if ctx.modules.is_trained and not torch._C._will_engine_execute_node(ctx.next_functions[1][0]):
            raise RuntimeError(
                "gradients of chosen tensors were asked for (autograd.grad, or backward(inputs=..)), but a reversible "
                "run gives those of its parameters to their .grad only; call backward() for all, freeze the "
                "parameters, or run with recompute=False"
            )
        gradients = gradients if isinstance(gradients, list) else [gradients]  # before torch 2.12
        counted = one_part_each(ctx.modules.parameters(), only_hooked=not ctx.first_parts)
        try:
            with (
                buffers_restored(ctx.changed_modules),
                ctx.modules.as_in_forward(),
                ctx.modules.attributes.running_again(),
                same_kernels(ctx.attention),
                counted,
            ):
                return _backward(ctx, gradients), None, None, None, None
        except RuntimeError as error:
            if "mark a variable ready only once" in str(error):
                raise RuntimeError(REMEDY) from error
            raise


def _run_forward(
    ctx: Any, x: Tensor, run: Run, watch: BufferWatch, observation: Observation | None
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Runs all branches and records what backward needs to run them again. Returns x, x[n-1], x[n] and saved states."""
    recording = Recording.begin(run, x.device)
    ctx.recording, ctx.observation, ctx.spent = recording, observation, False

    def update(index: int, function: BranchFunction, state: Tensor) -> Tensor:
        record = recording.branches[index]
        if record.saves == "graph":
            point, output = run_with_graph(recording, index, run.output, function, state, None)
            record.graphs.append(Graph.of(point, output))
            return output.detach()
        before, buffers = GeneratorState.now(state.device), watch.save()
        with recording.saving_attention(record):
            output = run.output(index, function, state)
        # Most branches draw nothing: their generator states, some kilobytes each, need not be kept.
        record.draws.append(None if before.same_as(GeneratorState.now(state.device)) else before)
        record.buffers.append(watch.changed_since(buffers))
        # What the first piece writes may be a table made when it is needed, which the others find.
        if len(record.buffers) > 1:
            run.refuse_writing_piece(index, record.buffers[-1])
        if record.saves == "output":
            # Before rounding, which widens it: under autocast it takes half the memory.
            record.outputs.append(output)
        return output

    # Detached, because inside a Function x still has requires_grad set, and hooks of modules act on that.
    with same_kernels():
        found = run.states(x.detach(), update, saved=run.saved_states(), observation=observation)
    ctx.changed_modules = watch.changed_modules()
    return found


def _backward(ctx: Any, gradients: list[Tensor]) -> Tensor | None:
    """Walks the states backwards and returns the gradient of x; parameters accumulate theirs on the way.

    `gradients` holds the gradient of the run's output. It is removed from the list, so that it can be freed early.

    In round i, `previous` is x[i], `current` is x[i+1], `to_previous` is dx[i+2] and `to_current` is dx[i+1]. Gradients
    follow the same recurrence as states, so each step updates the older of two buffers in place.
    """
    recording: Recording = ctx.recording
    recording.x_wants_gradient = ctx.needs_input_grad[0]
    run = recording.run
    length, coupling = len(run.branches), run.coupling
    saved = dict(zip(run.saved_states(), ctx.saved_tensors, strict=True))
    # Behind x[rebuilt] nothing is rebuilt, so backward starts from this pair. Its second state is needed only to
    # rebuild x[rebuilt - 2], and is not saved where that is.
    previous, current = saved.pop(run.rebuilt - 1), saved.pop(run.rebuilt, None)
    to_output = gradients.pop().to(run.precision.gradients)
    if run.streams is not None:
        to_previous, to_current = (gradient.clone() for gradient in to_output.chunk(2, run.streams))  # to be written
    else:  # dx[n+1] = dx[n], as x[-1] = x[0] in forward
        to_previous = to_current = coupling.gradient_of_end(to_output, merge=run.merge)
    # Only "extrapolate" needs the output's gradient again, at the start; there it is dx[n] itself. A mean frees it now.
    gradient = to_output if to_current is to_output else None
    del to_output
    for index in reversed(range(1, length)):
        # A gradient may be overwritten only if it has no other name, and is not the caller's.
        owned = not (to_previous is to_current or to_previous is gradient)
        # x[i-1] is either among the saved states or rebuilt in the buffer of x[i+1]. Branches that saved their graph
        # need neither.
        before = saved.pop(index - 1, None) if index < run.rebuilt else None
        following = current if before is None and index < run.rebuilt else None
        pieces = run.pieces(index, previous)
        if pieces:
            # Pieces add what they give to dx[i] straight into the buffer, so the rest of the sum must be there first.
            to_previous = coupling.carried(to_previous, to_current, owned=owned)
            differentiate_pieces(recording, index, pieces, previous, following, to_current, to_previous)
            to_previous, to_current = to_current, to_previous
        else:
            to_input = differentiate(recording, index, previous, following, to_current)
            advanced = coupling.advance(to_previous, to_current, to_input, owned=owned)
            to_previous, to_current = to_current, advanced
            # Both are in `to_current` now; the names would keep a gradient alive through the next round.
            del to_input, advanced
        # Behind the rebuilt branches nothing is rebuilt, so the pair stays where the last of them will need it.
        if index < run.rebuilt:
            previous, current = current if before is None else before, previous
    if ctx.observation is not None:
        ctx.observation.rebuilt(previous, current)
    older = [to_previous]
    del to_previous
    return _gradient_of_start(recording, previous, older, to_current, gradient)


def _gradient_of_start(
    recording: Recording, x: Tensor, older: list[Tensor], to_current: Tensor, gradient: Tensor | None
) -> Tensor | None:
    """Differentiates F_0 at x[0] = `x`. Returns the gradient of the run's input, if that wants one.

    `older` holds the gradient that comes before `to_current`. It is removed from the list, so that it can be freed.
    """
    to_previous = older.pop()
    run, coupling = recording.run, recording.run.coupling
    pieces = run.pieces(0, x)
    if run.streams is not None:
        if pieces:
            differentiate_pieces(recording, 0, pieces, x, None, to_current, to_previous)
        elif (to_input := differentiate(recording, 0, x, None, to_current)) is not None:
            to_previous = to_previous.add_(to_input)
        # dx[-1] = dx[1], because x[1] = x[-1] + F_0(x[0]); dx[0] = dx[2] + dF_0^T dx[1].
        return torch.cat((to_current, to_previous), run.streams) if recording.x_wants_gradient else None
    if pieces:
        to_x = coupling.gradient_of_start(to_previous, to_current, gradient, merge=run.merge)
        del to_previous
        differentiate_pieces(recording, 0, pieces, x, None, to_current, to_x)
        return to_x if recording.x_wants_gradient else None
    to_input = differentiate(recording, 0, x, None, to_current)
    if not recording.x_wants_gradient:
        return None
    return coupling.gradient_of_start(to_previous, to_current, gradient, merge=run.merge).add_(to_input)
