"""A picture's words have the characters that some installed font has."""

import warnings

import pytest
from matplotlib.figure import Figure

from re2tal.reporting.fonts import to_png


def figure_saying(text: str) -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().set_yticks([0.5], [text])
    return figure


def test_a_character_that_the_first_font_lacks_is_drawn_in_another() -> None:
    # Of the fonts that come with matplotlib, DejaVu Sans lacks it and STIXGeneral has it.
    figure = figure_saying("pole vault \u20dd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_png(figure)
    (label,) = figure.axes[0].get_yticklabels()
    assert label.get_fontfamily()[0] == "sans-serif"
    assert len(label.get_fontfamily()) == 2


def test_a_character_that_no_font_has_is_named_once() -> None:
    # The second to last of all; no script will ever have it.
    with pytest.warns(UserWarning, match="no installed font has \U0010fffe"):
        assert to_png(figure_saying("a\U0010fffeb\U0010fffe")).startswith(b"\x89PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_png(figure_saying("\U0010fffe"))
