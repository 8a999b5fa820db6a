"""Exit statuses of the `re2tal` command; 0 is done. docs/cluster.md lists them with what to do."""

from __future__ import annotations

SOME_LEFT_OUT = 1
"""The files are written, but some videos could not be used."""
WRONG_INPUT = 2
"""A fault in what the user gave, said in one line."""
TOO_MANY_REJECTED = 3
"""More videos than the user allowed cannot be used; the shards are complete without them."""
DAMAGED = 4
"""A shard differs from what was built."""
INTERRUPTED = 75
"""A run that was told to stop has saved; a job script may start it again with --resume."""
HUNG = 77
"""A rank hung, was stopped or died, and the others ended for it."""
DIVERGED = 78
"""The numbers of a run stopped being finite; starting it again would not help."""
KEYBOARD = 130
"""Stopped by the keyboard; finished files are kept."""
UNREAD = 141
"""Whoever read the output, such as `head`, has gone, as shells report a process that SIGPIPE ended."""
