"""The short help of each command: two examples, then the ten options that are used most.

The pages are made by `python docs/write_help_pages.py` from the commands themselves, and kept in help_pages.json:
to ask the commands would import torch, which takes seconds.
"""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from re2tal.cli.commands import COMMANDS, EXAMPLES

PAGES = Path(__file__).with_name("help_pages.json")
MOST_COLUMNS = 110


def commands_help() -> str:
    """What `re2tal --help` prints."""
    lines = [f"  {name:<13} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: re2tal COMMAND [options]",
            "       re2tal COMMAND --help        two examples and the options that are used most",
            "       re2tal COMMAND --help-all    all options",
            "       re2tal --version",
            "       re2tal --print-completion bash|zsh|fish",
            "",
            *lines,
            "",
            "  --debug, anywhere, prints the traceback of an error that is otherwise told in one line",
        ]
    )


def short_help(name: str, arguments: Sequence[str]) -> str:
    """The page of a command, or of the sub-command that `arguments` begin with."""
    pages: dict[str, dict[str, Any]] = json.loads(PAGES.read_text("utf-8"))
    page = page_of(name, arguments)
    found = pages[page]
    # Longer lines are hard to read; fewer than 40 columns would leave none for the text.
    width = min(MOST_COLUMNS, max(40, shutil.get_terminal_size().columns))
    parts = [found["usage"], examples(page), textwrap.fill(found["about"], width)]
    if found["options"]:
        parts.append(_options(found["options"], width))
    more = f"; it has {found['others']} more options" if found["others"] else ""
    return "\n\n".join([*parts, f"re2tal {page} --help-all explains everything{more}"])


def page_of(name: str, arguments: Sequence[str]) -> str:
    """The command with its sub-command, if `arguments` name one."""
    # The sub-command may come after options.
    return next((page for word in arguments if (page := f"{name} {word}") in EXAMPLES), name)


def examples(page: str) -> str:
    """Two uses."""
    return "\n".join(["examples:", *(f"  {example}" for example in EXAMPLES[page])])


def _options(rows: Sequence[Sequence[str]], width: int) -> str:
    # Long flags get a line of their own, so that they do not push all texts to the right.
    column = max(len(flag) for flag, _ in rows if len(flag) <= MOST_COLUMNS // 3) + 4
    lines = []
    for flag, text in rows:
        wrapped = textwrap.wrap(text, width - column) or [""]
        if len(flag) + 3 > column:
            lines.append(f"  {flag}")
        else:
            lines.append(f"  {flag:<{column - 2}}{wrapped.pop(0)}")
        lines += [" " * column + line for line in wrapped]
    return "\n".join(lines)
