"""Which rank holds up the others, by what each says of itself: the watchdog's rule, without threads and clocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PATIENCE = 3
"""Phases that may take long on one rank alone, such as a compilation or a save, get this many times the limit."""


@dataclass(frozen=True, slots=True)
class Report:
    """What one rank says of itself."""

    host: str
    phase: str
    patient: bool
    progress: int
    stays_seconds: float
    """How long it has made no progress."""
    waits_seconds: float
    """How long it has been in one collective."""


def judge(reports: Sequence[Report], silent_seconds: Sequence[float], *, limit_seconds: float) -> str | None:
    """Which ranks hold up the others, in words; None if nobody does.

    `silent_seconds`: how long ago each report changed.
    """
    names = [f"rank {rank} (host {report.host}, at {report.phase!r})" for rank, report in enumerate(reports)]
    # First: who cannot even report is at fault, whatever the others wait for.
    silent = [rank for rank, seconds in enumerate(silent_seconds) if seconds > limit_seconds]
    if silent:
        longest = max(silent_seconds[rank] for rank in silent)
        return (
            f"{', '.join(names[rank] for rank in silent)} gave no sign of life for {longest:.0f} s: its process is "
            "stopped or dead, or its machine or network is gone"
        )
    # The rank that is late decides how late it may be.
    limit = limit_seconds * max(PATIENCE if report.patient else 1 for report in reports)
    waited = max(report.waits_seconds for report in reports)
    # With NCCL devices wait, and no host is in a collective. Then only that no rank makes progress shows it.
    if not any(report.patient for report in reports):
        waited = max(waited, min(report.stays_seconds for report in reports))
    if waited <= limit:
        return None
    # Whoever is not in a collective is waited for; where all are, or devices wait instead of hosts, the last one is.
    late = [rank for rank, report in enumerate(reports) if report.waits_seconds == 0]
    if len(late) in (0, len(reports)):
        least = min(report.progress for report in reports)
        late = [rank for rank, report in enumerate(reports) if report.progress == least]
    # Others may wait long for a rank that takes several steps meanwhile: it is slow, and hangs only if it goes on so.
    if max(reports[rank].stays_seconds for rank in late) <= limit_seconds and waited <= PATIENCE * limit:
        return None
    if len(late) == len(reports):
        return f"no rank made progress for {waited:.0f} s, and none is behind the others: {', '.join(names)}"
    return f"{', '.join(names[rank] for rank in late)} holds up the others for {waited:.0f} s"
