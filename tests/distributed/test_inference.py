"""Inference inside a DeepSpeed engine: the same detections as the plain network's, and training goes on after it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed.ranks import run_ranks
from training.tiny import Scores, TinyClips, TinyDetector

from re2tal.data.streaming.transforms import normalise
from re2tal.distributed import resolve_world
from re2tal.evaluation.suppression import SuppressionConfig
from re2tal.inference import predict
from re2tal.structures import ClipBatch, Detections, Timeline
from re2tal.training.config import EngineConfig
from re2tal.training.engine import build_engine
from re2tal.training.optimizer import OptimizerConfig, build_optimizer
from re2tal.training.process_group import join, leave
from re2tal.training.zero_file import resolve_deepspeed_config

SUPPRESSION = SuppressionConfig(method="none")


class Finder(TinyDetector):
    """Every frame is a detection; its score says what the network made of it."""

    def detect(self, outputs: Scores, timelines: tuple[Timeline, ...], *, num_frames: int) -> list[Detections]:
        steps = torch.arange(num_frames)
        return [
            Detections(
                torch.stack([timeline.to_seconds(steps), timeline.to_seconds(steps + 1)], dim=1),
                values.sigmoid(),
                torch.zeros(num_frames, dtype=torch.int64),
            )
            for values, timeline in zip(outputs.values, timelines, strict=True)
        ]


def batches(rank: int) -> list[ClipBatch]:
    """Four batches of two clips, named differently on each rank."""
    return [
        replace(batch, video_ids=tuple(f"rank{rank}_{name}" for name in batch.video_ids))
        for batch in TinyClips(rank=rank).epoch(0)
    ]


def rows(found: dict[str, Detections]) -> list:
    return [[name, one.segments, one.scores] for name, one in found.items()]


def predict_in_engine(stage: int, folder: str) -> dict:
    """What the plain network finds in all ranks' clips, and the engine, before and after a training step."""
    world, config = resolve_world(os.environ), EngineConfig(batch_size=2, timeout_minutes=1)
    device = join(world, config)
    torch.manual_seed(0)
    model = Finder().to(device)
    plain = predict_alone(model, world.world_size)
    ds = Path(folder) / f"ds{world.rank}.json"
    # Parameters this small would stay whole under ZeRO-3.
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    ds.write_text(json.dumps({"zero_optimization": zero}))
    engine = build_engine(
        model,
        build_optimizer(model, OptimizerConfig(learning_rate=1e-2, backbone_learning_rate=1e-2)),
        factor=lambda step: 1.0,
        settings=resolve_deepspeed_config(ds, config, world_size=world.world_size),
    )
    engine.train()
    before = predict(engine, batches(world.rank), suppression=SUPPRESSION, device=device)
    assert engine.training
    batch = batches(world.rank)[0]
    engine.backward(engine(batch.frames.float() / 255, batch.frame_mask).values.square().sum())
    engine.step()
    after = predict(engine, batches(world.rank), suppression=SUPPRESSION, device=device)
    leave()
    return {"plain": rows(plain), "before": rows(before), "after": rows(after)}


def predict_alone(model: Finder, world_size: int) -> dict[str, Detections]:
    """The clips of every rank through the network itself."""
    found: dict[str, Detections] = {}
    with torch.no_grad():
        for rank in range(world_size):
            for batch in batches(rank):
                outputs = model.eval()(normalise(batch.frames), batch.frame_mask)
                found |= zip(batch.video_ids, model.detect(outputs, batch.timelines, num_frames=8), strict=True)
    model.train()
    return dict(sorted(found.items()))


@pytest.mark.parametrize("stage", [0, 3])
def test_an_engine_finds_what_the_plain_network_finds_and_trains_on(stage: int, tmp_path: Path) -> None:
    for results in run_ranks(predict_in_engine, world_size=2, stage=stage, folder=str(tmp_path)):
        assert [name for name, *_ in results["plain"]] == [name for name, *_ in results["before"]]
        for (_, segments, scores), (_, expected_segments, expected_scores) in zip(
            results["before"], results["plain"], strict=True
        ):
            order = torch.argsort(expected_scores, descending=True, stable=True)
            torch.testing.assert_close(segments, expected_segments[order].float())
            torch.testing.assert_close(scores, expected_scores[order], rtol=1e-5, atol=1e-6)
        assert not torch.equal(results["after"][0][2], results["before"][0][2])
