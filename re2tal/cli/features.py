"""`re2tal features extract | pack`: what a backbone sees in each video, stored once, to train localizers on."""

from __future__ import annotations

from typing import Annotated

import tyro

from re2tal.runs.feature_extraction import Extract, extract
from re2tal.runs.feature_packing import Pack, pack
from re2tal.runs.shard_listing import report_built


def features(command: Annotated[Extract | Pack, tyro.conf.arg(name="")]) -> int:
    """Extract features with a backbone, or pack those of another program."""
    match command:
        case Extract():
            written, allowed = extract(command), command.max_rejected
            return max(report_built(one, subset=one.folder.name, max_rejected=allowed) for one in written)
        case Pack():
            return pack(command)
