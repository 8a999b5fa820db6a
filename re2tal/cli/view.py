"""`re2tal view`: videos beside predictions and annotations on a local page, and corrections saved as annotations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from re2tal.runs.viewing import AS_USUAL, ViewOptions
from re2tal.runs.viewing import view as serve


def view(
    source: tyro.conf.Positional[Path],
    /,
    *,
    options: Annotated[ViewOptions, tyro.conf.arg(name="")] = AS_USUAL,
    open: bool = True,
) -> None:
    """Look at detections beside their videos in a browser, and correct them into annotations.

    The page is served on 127.0.0.1 to this machine only, until Ctrl-C; docs/view.md tells its keys.

    Args:
        source: folder of a training run, or a results JSON in ActivityNet's layout
        options: what is shown beside the predictions, and where corrections go
        open: open the page in the browser
    """
    serve(source, options, open_page=open)
