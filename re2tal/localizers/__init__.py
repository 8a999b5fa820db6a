"""One file per localizer; LOCALIZERS lists them.

A new one gets a file with its configuration and what builds it, and its row here: both names, in the union and in the
table. Options, help, config.json and the contract's tests follow from that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from re2tal.localizers.base import Localizer
from re2tal.localizers.pyramid.actionformer import ActionFormerConfig, actionformer
from re2tal.localizers.pyramid.temporalmaxer import TemporalMaxerConfig, temporalmaxer
from re2tal.localizers.pyramid.tridet import TriDetConfig, tridet
from re2tal.localizers.vsgn.config import VSGNConfig
from re2tal.localizers.vsgn.localizer import VSGN

LocalizerConfig = ActionFormerConfig | TemporalMaxerConfig | TriDetConfig | VSGNConfig
"""What a localizer is built from; `name` tells them apart."""

LOCALIZERS: dict[str, Callable[..., Localizer]] = {
    "actionformer": actionformer,
    "temporalmaxer": temporalmaxer,
    "tridet": tridet,
    "vsgn": VSGN,
}


def build_localizer(config: LocalizerConfig, *, in_channels: int, classes: Sequence[str]) -> Localizer:
    """The localizer that `config.name` names, for features of `in_channels` channels and actions of `classes`."""
    try:
        build = LOCALIZERS[config.name]
    except KeyError:
        raise ValueError(f"unknown localizer {config.name!r}; known: {sorted(LOCALIZERS)}") from None
    return build(config, in_channels=in_channels, classes=classes)
