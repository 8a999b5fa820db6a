"""What a timeline draws, read from the figure itself."""

from __future__ import annotations

import pytest
import torch
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from re2tal.reporting.fonts import to_png
from re2tal.reporting.timelines import draw_timeline
from re2tal.structures import Action, Detections, VideoRecord

CLASSES = ("jump", "run", "swim")


def detected(*rows: tuple[float, float, float, int]) -> Detections:
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    return Detections(table[:, :2], table[:, 2], table[:, 3].long())


def record(*actions: tuple[float, float, str], seconds: float = 60.0) -> VideoRecord:
    return VideoRecord("video", "validation", seconds, tuple(Action(*action) for action in actions))


def bars(figure: Figure, name: str) -> list[tuple[float, float, float, float]]:
    """(start, end, top, opacity) of the bars drawn as `name`: "true", "right" or "wrong"."""
    found = []
    for drawn in figure.axes[0].collections:
        assert isinstance(drawn, PolyCollection)
        if drawn.get_gid() == name:
            for path, colour in zip(drawn.get_paths(), drawn.get_facecolor(), strict=True):
                (start, top), (end, _) = path.vertices.min(axis=0), path.vertices.max(axis=0)
                found.append((float(start), float(end), float(top), float(colour[3])))
    return found


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_yticklabels()]


def test_every_segment_is_a_bar_and_right_ones_are_told_from_wrong_ones() -> None:
    figure = draw_timeline(
        record((0, 10, "jump"), (20, 30, "jump"), (40, 50, "run")),
        detected((1, 10, 0.9, 0), (2, 11, 0.8, 0), (21, 30, 0.7, 0), (0, 5, 0.6, 1)),
        classes=CLASSES,
    )
    assert [bar[:2] for bar in bars(figure, "true")] == [(0, 10), (20, 30), (40, 50)]
    assert [bar[:2] for bar in bars(figure, "right")] == [(1, 10), (21, 30)]
    assert sorted(bar[:2] for bar in bars(figure, "wrong")) == [(0, 5), (2, 11)]


def test_truth_is_above_predictions_and_overlapping_predictions_are_below_each_other() -> None:
    figure = draw_timeline(
        record((0, 10, "jump")), detected((0, 10, 0.9, 0), (1, 9, 0.8, 0), (20, 30, 0.7, 0)), classes=CLASSES
    )
    (true,) = bars(figure, "true")
    (right,) = bars(figure, "right")
    tops = {bar[:2]: bar[2] for bar in bars(figure, "wrong")}
    assert true[2] < right[2] < tops[1, 9]  # the axis points down
    assert tops[20, 30] == right[2]
    bottom, top = figure.axes[0].get_ylim()
    assert bottom > top


def test_true_actions_of_one_class_that_overlap_are_drawn_apart() -> None:
    truths = (10, 60, "jump"), (20, 70, "jump"), (30, 80, "jump"), (80, 90, "jump")
    figure = draw_timeline(record(*truths, seconds=90.0), detected((10, 60, 0.9, 0)), classes=CLASSES)
    tops = {bar[:2]: bar[2] for bar in bars(figure, "true")}
    assert tops[10, 60] < tops[20, 70] < tops[30, 80] < bars(figure, "right")[0][2]
    assert tops[80, 90] == tops[10, 60]
    assert all(bar[3] < 1 for bar in bars(figure, "true"))  # so that the outline between 80 and 80 is seen


def test_a_true_action_beyond_the_end_of_its_video_is_shown_to_its_end() -> None:
    figure = draw_timeline(record((8, 15, "jump"), seconds=10.0), detected(), classes=CLASSES)
    assert figure.axes[0].get_xlim() == (0.0, 15.0)


def test_a_long_id_leaves_room_for_what_the_title_says() -> None:
    video = VideoRecord("W" * 200, "validation", 60.0, ())
    figure = draw_timeline(video, detected(*[(i, i + 1, 0.5, 0) for i in range(30)]), classes=CLASSES)
    to_png(figure)
    title = figure.axes[0]._left_title
    assert title.get_text().endswith("…\n60.0 s   (best 20 of 30 predictions)")
    assert title.get_window_extent().x1 <= figure.get_window_extent().width


def test_scores_stand_out_on_their_bars() -> None:
    found = detected((0, 20, 1.0, 0), (20, 40, 0.55, 0), (40, 60, 1.0, 1))
    figure = draw_timeline(record((0, 20, "jump"), (20, 40, "jump")), found, classes=CLASSES)
    inks = {text.get_position()[0]: text.get_color() for text in figure.axes[0].texts}
    assert inks == {10: "white", 30: "black", 50: "black"}  # on blue, on pale blue, on orange


def test_a_stand_in_is_not_shown_as_the_length_of_a_video() -> None:
    drawn = record((1, 46, "jump"), seconds=46.0), detected((50, 60, 0.9, 0))
    known, unknown = (draw_timeline(*drawn, classes=CLASSES, is_length_known=is_known) for is_known in (True, False))
    assert "46.0 s" in known.axes[0].get_title(loc="left")
    assert "length not known" in (title := unknown.axes[0].get_title(loc="left"))
    assert "46" not in title
    assert [len(known.axes[0].lines), len(unknown.axes[0].lines)] == [2, 1]  # the end of the video is one of them


def test_opacity_grows_with_the_score() -> None:
    figure = draw_timeline(record(), detected((0, 1, 0.1, 0), (2, 3, 0.5, 0), (4, 5, 3.0, 0)), classes=CLASSES)
    opacity = {bar[0]: bar[3] for bar in bars(figure, "wrong")}
    assert 0.1 < opacity[0] < opacity[2] < opacity[4] == 1.0


def test_rows_are_true_classes_by_time_then_others_by_score() -> None:
    figure = draw_timeline(
        record((30, 40, "run"), (0, 10, "swim")), detected((0, 5, 0.3, 0), (0, 5, 0.2, 1)), classes=CLASSES
    )
    assert labels(figure) == ["swim", "run", "jump"]


def test_the_best_are_drawn_and_the_title_says_how_many_were_left_out() -> None:
    rows = [(float(i), i + 0.9, 0.99 - i / 100, i % 3) for i in range(30)]
    figure = draw_timeline(record(), detected(*rows), classes=CLASSES, max_detections=5, max_rows=2)
    assert sorted(bar[0] for bar in bars(figure, "wrong")) == [0, 1, 3, 4]
    assert labels(figure) == ["jump", "run"]
    assert "best 5 of 30 predictions, 2 of 3 classes" in figure.axes[0].get_title(loc="left")


def test_at_least_twice_as_many_predictions_as_true_actions_are_drawn() -> None:
    truths = [(float(i), i + 0.5, "jump") for i in range(8)]
    rows = [(float(i), i + 0.5, 0.5, 0) for i in range(40)]
    figure = draw_timeline(record(*truths), detected(*rows), classes=CLASSES, max_detections=5)
    assert len(bars(figure, "right")) + len(bars(figure, "wrong")) == 16


def test_the_axis_is_in_seconds_of_the_video_and_shows_what_lies_beyond_it() -> None:
    axes = draw_timeline(record(seconds=12.5), detected((1, 2, 0.5, 0)), classes=CLASSES).axes[0]
    assert axes.get_xlabel() == "seconds"
    assert axes.get_xlim() == (0, 12.5)
    assert draw_timeline(record(seconds=12.5), detected((1, 20, 0.5, 0)), classes=CLASSES).axes[0].get_xlim() == (0, 20)


def test_an_empty_video_says_so() -> None:
    figure = draw_timeline(record(), detected(), classes=CLASSES)
    assert "no action is annotated, none was predicted" in [text.get_text() for text in figure.axes[0].texts]
    assert to_png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["$\\frac{", "a" * 300, "two words " * 40, "<script>alert(1)</script>", "$x_1$"])
def test_any_name_can_be_drawn_and_stays_inside_the_picture(name: str) -> None:
    video = VideoRecord(name, "validation", 10.0, (Action(1, 2, name),))
    figure = draw_timeline(video, detected(), classes=CLASSES)
    assert to_png(figure).startswith(b"\x89PNG")
    width = figure.get_window_extent().width
    for text in figure.axes[0].get_yticklabels():
        assert text.get_window_extent().x0 >= 0
        assert text.get_window_extent().x1 <= width


def test_a_long_video_with_many_actions_shows_each_of_them() -> None:
    truths = [(float(10 * i), 10.0 * i + 1, CLASSES[i % 3]) for i in range(300)]
    figure = draw_timeline(record(*truths, seconds=3600.0), detected(), classes=CLASSES)
    assert len(bars(figure, "true")) == 300
    drawn = [one for one in figure.axes[0].collections if one.get_gid() == "true"]
    assert all(one.get_linewidth()[0] >= 0.5 for one in drawn)  # a second is a third of a pixel here
