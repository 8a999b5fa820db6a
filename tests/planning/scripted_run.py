"""A dry run by rule instead of by running: stages whose memory can be worked out by hand."""

from __future__ import annotations

import torch

from re2tal.config import build_detector
from re2tal.planning.dry_run import Event, Phase, Trace
from re2tal.rewire import stages_of

MEGABYTE = 10**6
STATE, INSIDE, STORED_UNIT, OTHER_BLOCKS = 10 * MEGABYTE, 64 * MEGABYTE, 30 * MEGABYTE, 25 * MEGABYTE


class ScriptedRun:
    """Every stage keeps two states, if not on the host, STORED_UNIT per stored unit, a state per branch that is known,
    and OTHER_BLOCKS if it has blocks that are not residual and keeps them; inside it needs INSIDE, or a piece of it."""

    def __init__(self, run, *, num_classes: int, device: torch.device, **_) -> None:
        self.device = device
        self.network = build_detector(run, [f"class {number}" for number in range(num_classes)])

    def stages(self):
        return stages_of(self.network.backbone)

    def trace(self) -> Trace:
        live, batch, phases, kept = 5 * MEGABYTE, 5 * MEGABYTE, [Phase(Event("start", 0), 0, 5 * MEGABYTE, 0)], []
        host = 0
        for s, stage in enumerate(self.stages().values()):
            config, units = stage.config, sum(len(lengths) and sum(lengths) for _, lengths in stage.runs())
            stored = units if not config.recompute else min(config.stored, units)
            inside = INSIDE if config.chunk_mebibytes is None else min(INSIDE, int(config.chunk_mebibytes * 2**20))
            states = 2 * STATE if stored < units else 0
            known = min(config.known, units - stored) * STATE
            keeps = stage.can_checkpoint_nonresidual() and (config.keep_nonresidual or not config.recompute)
            known += OTHER_BLOCKS * keeps
            kept.append(stored * STORED_UNIT + known + (0 if config.offload else states))
            host += states if config.offload else 0
            phases.append(
                Phase(Event("forward", s), live, live + max(inside // 2, stored * STORED_UNIT + known + states), 0)
            )
            live += kept[-1]
        phases.append(Phase(Event("between", 0), live, live + MEGABYTE, 0))
        for s, stage in reversed(list(enumerate(self.stages().values()))):
            config = stage.config
            chunk = config.chunk_mebibytes
            inside = STATE if not config.recompute else INSIDE if chunk is None else min(INSIDE, int(chunk * 2**20))
            stored = config.stored * STORED_UNIT if config.recompute else 0
            fetched = 2 * STATE if config.offload else 0
            phases.append(Phase(Event("backward", s), live, live + fetched + max(STATE, inside - stored), 0))
            live -= kept[s]
        return Trace(batch, tuple(phases), host=host)
