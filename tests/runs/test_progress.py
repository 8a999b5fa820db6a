"""Lines of progress, by a clock of the test's own."""

from __future__ import annotations

import io

from re2tal.runs.progress import Progress, clock_time


def test_lines_come_after_a_second_and_then_more_seldom_with_the_time_left() -> None:
    now, stream = [0.0], io.StringIO()
    progress = Progress(1000, stream=stream, clock=lambda: now[0])
    for second in range(1, 301):
        now[0] = second
        progress.to(2 * second, "party")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "  0% after 0:01, about 8:19 left: party"
    assert lines[-1] == " 49% after 4:04, about 4:16 left: party"
    assert len(lines) == 10


def test_nothing_is_shown_where_nobody_looks_and_times_are_read_easily() -> None:
    stream = io.StringIO()
    progress = Progress(0, shown=False, stream=stream)
    progress.to(5, "x")
    progress.close()
    assert stream.getvalue() == ""
    assert [clock_time(one) for one in (0.4, 75, 3723)] == ["0:00", "1:15", "1:02:03"]
