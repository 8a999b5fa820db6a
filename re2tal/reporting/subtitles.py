"""Detections as subtitles, which any player shows over the video: SubRip (.srt) and WebVTT (.vtt).

Each action is a line of text from its start to its end; players show those of the same time one above the other.
"""

from __future__ import annotations

from re2tal.reporting.found import FoundAction, FoundInVideo, milliseconds_of


def srt(video: FoundInVideo) -> str:
    """SubRip, as VLC, mpv and YouTube read it. It has no way to escape markup, so < and > become other characters."""
    cues = []
    for number, action in enumerate(_in_order(video), start=1):
        first, last = (_clock(ms, ",") for ms in milliseconds_of(action))
        text = _text(action).replace("<", "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}")
        text = text.replace(">", "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}")
        cues.append(f"{number}\n{first} --> {last}\n{text}\n")
    return "\n".join(cues)


def webvtt(video: FoundInVideo) -> str:
    """WebVTT (W3C), as browsers read it in a <track>."""
    cues = ["WEBVTT\n"]
    for action in _in_order(video):
        first, last = (_clock(ms, ".") for ms in milliseconds_of(action))
        text = _text(action).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        cues.append(f"{first} --> {last}\n{text}\n")
    return "\n".join(cues)


def _in_order(video: FoundInVideo) -> list[FoundAction]:
    return sorted(video.actions, key=lambda one: (one.start_seconds, one.end_seconds, one.label))


def _text(action: FoundAction) -> str:
    """One line: an empty line would end the cue."""
    return f"{' '.join(action.label.split())} ({action.score:.2f})"


def _clock(milliseconds: int, point: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{point}{rest:03d}"
