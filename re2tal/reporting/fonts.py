"""Pictures of figures whose words have characters that matplotlib's own font lacks, such as Chinese ones.

They are drawn again with what other fonts of this machine have.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from io import BytesIO

from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

_MISSING = re.compile(r"Glyph (\d+) .*missing from")
_told: set[str] = set()
"""Characters that a warning has named."""
_STAND_IN = "Last Resort"
"""The font that comes with matplotlib and has a box for each character there is."""


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file; a warning names, once, the characters that no font of this machine has."""
    png, missing = _drawn(figure)
    if not missing:
        return png
    others = _fonts_with(missing)
    for text in figure.findobj(Text):
        text.set_fontfamily([*text.get_fontfamily(), *others])
    png, missing = _drawn(figure)
    # Of a page, every picture may have them.
    if missing := missing - _told:
        _told.update(missing)
        some = "".join(sorted(missing)[:10])
        said = f"no installed font has {some}: pictures show boxes; install one that does, such as Noto Sans CJK"
        warnings.warn(said, stacklevel=2)
    return png


def _drawn(figure: Figure) -> tuple[bytes, set[str]]:
    """The picture, and the characters that have a box in it."""
    buffer = BytesIO()
    missing = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(buffer, format="png")
    for one in caught:
        if found := _MISSING.match(str(one.message)):
            missing.add(chr(int(found[1])))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return buffer.getvalue(), missing


def _fonts_with(characters: Collection[str]) -> list[str]:
    """Names of upright fonts of normal weight that have them: at each step the one with most of what is left."""
    left, names = {ord(one) for one in characters}, []
    upright = (one for one in fontManager.ttflist if one.style == "normal" and one.weight == 400)
    has = {one.name: left & _charmap(one.fname) for one in upright if not one.name.startswith(_STAND_IN)}
    while has and (best := max(sorted(has), key=lambda name: len(has[name] & left))) and has[best] & left:
        names.append(best)
        left -= has[best]
    return names


def _charmap(file: str) -> set[int]:
    try:
        return set(FT2Font(file).get_charmap())
    except RuntimeError:  # a damaged font is none
        return set()
