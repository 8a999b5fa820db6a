"""Windows become videos: merging, padding, gathering, whatever the number of ranks."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from distributed.ranks import run_ranks
from torch import Tensor, nn

from re2tal.data.streaming.transforms import MEAN, STD
from re2tal.evaluation.suppression import SuppressionConfig
from re2tal.inference import average_flips, classify, concatenate, detect_windows, merge_windows, predict
from re2tal.recognizer import Recognition
from re2tal.structures import ClipBatch, Detections, Timeline

KEEP_ALL = SuppressionConfig(method="none")
HARD = SuppressionConfig(method="hard", iou_threshold=0.5)
T, SECONDS_PER_FRAME = 8, 0.5


class Brightness(NamedTuple):
    """(B, T) mean over pixels"""

    values: Tensor


class BrightFrames(nn.Module):
    """Finds every bright frame: a detection as long as the frame, scored by how bright it is."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.seen_modes: list[bool] = []
        self.seen_grads: list[bool] = []

    def forward(self, frames: Tensor, frame_mask: Tensor) -> Brightness:
        self.seen_modes.append(self.training)
        self.seen_grads.append(torch.is_grad_enabled())
        assert frames.dtype == self.gain.dtype
        return Brightness(self.gain * frames.mean(dim=(1, 3, 4)) * frame_mask)

    def detect(self, outputs: Brightness, timelines: tuple[Timeline, ...], *, num_frames: int) -> list[Detections]:
        assert num_frames == outputs.values.shape[1]
        assert outputs.values.dtype == torch.float32
        found = []
        for values, timeline in zip(outputs.values, timelines, strict=True):
            steps = (values > 1).nonzero()[:, 0]
            segments = torch.stack([timeline.to_seconds(steps), timeline.to_seconds(steps + 1)], dim=1)
            found.append(Detections(segments, values[steps] / 10, torch.zeros_like(steps)))
        return found


def clip(video_id: str, window_id: int, bright: dict[int, int], *, valid: bool = True) -> ClipBatch:
    """One clip of 8 frames of half a second, window n starting at 2 n seconds; `bright` frames have that grey."""
    frames = torch.zeros(1, 3, T, 2, 2, dtype=torch.uint8)
    for frame, grey in bright.items():
        frames[:, :, frame] = grey
    return ClipBatch(
        frames=frames,
        frame_mask=torch.ones(1, T, dtype=torch.bool),
        actions=((),),
        timelines=(Timeline(2.0 * window_id, SECONDS_PER_FRAME, 100.0),),
        video_ids=(video_id,),
        window_ids=(window_id,),
        valid=torch.tensor([valid]),
    )


def batch(*clips: ClipBatch) -> ClipBatch:
    return ClipBatch(
        frames=torch.cat([one.frames for one in clips]),
        frame_mask=torch.cat([one.frame_mask for one in clips]),
        actions=tuple(one.actions[0] for one in clips),
        timelines=tuple(one.timelines[0] for one in clips),
        video_ids=tuple(one.video_ids[0] for one in clips),
        window_ids=tuple(one.window_ids[0] for one in clips),
        valid=torch.cat([one.valid for one in clips]),
    )


def score_of(grey: int) -> float:
    return sum((grey - mean) / std for mean, std in zip(MEAN, STD, strict=True)) / 3 / 10


def test_windows_of_a_video_are_merged_in_seconds_of_the_video() -> None:
    # Frame 6 of window 0 and frame 2 of window 1 both show second 3 to 3.5: one of them is left.
    batches = [batch(clip("b", 0, {6: 255}), clip("a", 0, {})), batch(clip("b", 1, {2: 240, 7: 200}))]
    found = predict(BrightFrames(), batches, suppression=HARD, device="cpu")
    assert list(found) == ["a", "b"]
    assert len(found["a"]) == 0
    assert found["b"].segments.tolist() == [[3.0, 3.5], [5.5, 6.0]]
    assert found["b"].scores.tolist() == pytest.approx([score_of(255), score_of(200)], rel=1e-5)


def test_clips_that_are_not_valid_are_forgotten() -> None:
    batches = [batch(clip("a", 0, {1: 255}), clip("b", 0, {1: 255}, valid=False), clip("a", 0, {5: 255}, valid=False))]
    found = predict(BrightFrames(), batches, suppression=KEEP_ALL, device="cpu")
    assert list(found) == ["a"]
    assert found["a"].segments.tolist() == [[0.5, 1.0]]


def test_a_window_that_comes_twice_counts_once() -> None:
    batches = [clip("a", 0, {1: 255}), clip("a", 0, {1: 255})]
    assert len(predict(BrightFrames(), batches, suppression=KEEP_ALL, device="cpu")["a"]) == 1


@pytest.mark.parametrize("training", [True, False])
def test_the_network_sees_evaluation_without_gradients_and_keeps_its_mode(training: bool) -> None:
    detector = BrightFrames().train(training)
    predict(detector, [clip("a", 0, {})], suppression=KEEP_ALL, device="cpu")
    assert detector.seen_modes == [False]
    assert detector.seen_grads == [False]
    assert detector.training is training


def test_a_clip_and_its_mirror_image_are_averaged() -> None:
    class LeftHalf(BrightFrames):
        """Sees the left column of the frames alone."""

        def forward(self, frames: Tensor, frame_mask: Tensor) -> Brightness:
            return super().forward(frames[..., :1], frame_mask)

    left, right = clip("a", 0, {1: 255}), clip("a", 0, {1: 255})
    left.frames[..., 1] = 110
    right.frames[..., 0] = 110
    found = [predict(LeftHalf(), [one], suppression=KEEP_ALL, device="cpu")["a"] for one in (left, right)]
    assert [len(one) for one in found] == [1, 0]  # the half that it sees is bright in one, dark in the other
    detector = LeftHalf()
    average_flips(detector)
    both = [predict(detector, [one], suppression=KEEP_ALL, device="cpu")["a"] for one in (left, right)]
    mean = (score_of(255) + score_of(110)) / 2
    assert [one.scores.tolist() for one in both] == [[pytest.approx(mean, rel=1e-5)]] * 2


def test_the_mode_comes_back_after_an_error() -> None:
    detector = BrightFrames().train()
    wrong = clip("a", 0, {})
    with pytest.raises(ValueError, match="zip"):
        detect_windows(detector, [ClipBatch(wrong.frames, wrong.frame_mask, (), (), (), (), wrong.valid)], device="cpu")
    assert detector.training


def test_weights_of_half_precision_get_frames_of_their_type_and_detections_are_float32() -> None:
    detector = BrightFrames().to(torch.bfloat16)
    found = predict(detector, [clip("a", 0, {1: 255})], suppression=KEEP_ALL, device="cpu")
    assert found["a"].scores.dtype == torch.float32
    assert found["a"].scores.tolist() == pytest.approx([score_of(255)], rel=1e-2)


def test_an_engine_around_the_detector_is_called_in_its_place() -> None:
    class Engine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = BrightFrames()
            self.calls = 0

        def forward(self, *inputs: Tensor) -> Brightness:
            self.calls += 1
            return self.module(*inputs)

    engine = Engine()
    assert len(predict(engine, [clip("a", 0, {1: 255})], suppression=KEEP_ALL, device="cpu")["a"]) == 1
    assert engine.calls == 1


def test_detections_that_are_not_finite_name_their_video() -> None:
    broken = Detections(torch.tensor([[0.0, float("nan")]]), torch.tensor([0.5]), torch.tensor([0]))
    with pytest.raises(ValueError, match="video 'a': detections hold NaN"):
        merge_windows({("a", 0): broken}, suppression=KEEP_ALL)


def test_concatenation_keeps_order_and_types() -> None:
    one = Detections(torch.tensor([[0.0, 1.0]]), torch.tensor([0.5]), torch.tensor([3]))
    empty = Detections(torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    both = concatenate([empty, one, one])
    assert both.segments.tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert both.labels.dtype == torch.int64


def predict_as_rank() -> list:
    """Three windows of two videos and a filler, dealt to the ranks; what this rank holds afterwards."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    units = [
        clip("b", 0, {6: 255}),
        clip("a", 0, {0: 250}),
        clip("b", 1, {2: 240, 7: 200}),
        clip("b", 0, {6: 255}, valid=False),
    ]
    found = predict(BrightFrames(), units[rank::world_size], suppression=HARD, device="cpu")
    dist.destroy_process_group()
    return [[name, one.segments, one.scores, one.labels] for name, one in found.items()]


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_rank_has_all_detections_whatever_the_number_of_ranks(world_size: int) -> None:
    for name_first, name_second in run_ranks(predict_as_rank, world_size=world_size):
        assert name_first[0] == "a"
        assert name_first[1].tolist() == [[0.0, 0.5]]
        assert name_second[0] == "b"
        assert name_second[1].tolist() == [[3.0, 3.5], [5.5, 6.0]]


class BrightOrDark(BrightFrames):
    """Two classes; the logit of the first is the brightness of the first frame."""

    def forward(self, frames: Tensor, frame_mask: Tensor) -> Recognition:
        bright = super().forward(frames, frame_mask).values[:, 0]
        return Recognition(torch.stack([bright, torch.zeros_like(bright)], dim=1), frame_mask.any(dim=1))


def classify_as_rank() -> list:
    """Three views of one video, one of another and a filler, dealt to the ranks."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    units = [
        clip("b", 0, {0: 255}),
        clip("a", 0, {0: 250}),
        clip("b", 1, {}),
        clip("b", 2, {0: 128}),
        clip("c", 0, {}),
        clip("b", 0, {0: 10}, valid=False),
    ]
    found = classify(BrightOrDark(), units[rank::world_size], device="cpu")
    dist.destroy_process_group()
    return [[name, one] for name, one in found.items()]


def test_the_probabilities_of_a_videos_views_are_averaged_whatever_the_number_of_ranks() -> None:
    one, *_ = run_ranks(classify_as_rank, world_size=1)
    for of_rank in run_ranks(classify_as_rank, world_size=2):
        assert [name for name, _ in of_rank] == ["a", "b", "c"]
        assert all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in zip(of_rank, one, strict=True))
    expected = torch.stack([torch.sigmoid(brightness(grey)) for grey in (255, 0, 128)]).mean()
    torch.testing.assert_close(one[1][1], torch.stack([expected, 1 - expected]))


def brightness(grey: int) -> Tensor:
    """What a whole frame of one grey becomes: the mean over channels of its normalised values."""
    return torch.tensor([(grey - mean) / std for mean, std in zip(MEAN, STD, strict=True)]).mean()


def test_probabilities_that_are_not_finite_are_an_error_that_names_the_video() -> None:
    model = BrightOrDark()
    torch.nn.init.constant_(model.gain, float("nan"))
    with pytest.raises(ValueError, match="video 'a': its probabilities are not finite"):
        classify(model, [clip("a", 0, {0: 250})], device="cpu")
