"""The `re2tal` command: parse, build, call. One file per subcommand; a command is imported only when it is called."""

from __future__ import annotations

import importlib
import os
import select
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from difflib import get_close_matches
from functools import partial
from io import TextIOWrapper
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import re2tal
from re2tal.cli.commands import COMMANDS, STARTING_POINTS
from re2tal.cli.faults import end, of_a_file
from re2tal.cli.help import commands_help, examples, page_of, short_help
from re2tal.files import is_stdout
from re2tal.runs.exit_status import DIVERGED, KEYBOARD, UNREAD, WRONG_INPUT
from re2tal.training.signals import stop_requests

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry

HELP = {"-h", "--help"}
SHELLS = ("bash", "zsh", "fish")
SEVERAL_VALUES = {
    *("--classes", "--clips", "--seeds", "--seeds-of-a", "--seeds-of-b", "--subsets", "--tiers", "--top-kx"),
    "--weights",
}
"""Options that mean all, or none, where they are left out."""
LESS_MEMORY = (
    "Take a smaller batch; or, in training, --engine.memory-budget-gb auto, which keeps a step within what is free "
    "(re2tal plan counts what one needs)"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `re2tal` command; `arguments` without the program's name, from the command line by default.

    A fault in what the user gave (ValueError, OSError) ends in one line on stderr and exit status 2, never in a
    traceback, unless --debug asks for it.
    """
    _escape_what_cannot_be_encoded()
    # --debug may stand anywhere, also behind a command; no command knows it.
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    debug = "--debug" in words
    name, *rest = [word for word in words if word != "--debug"] or ["--help"]
    # A document that goes to stdout stands there alone.
    is_taken = any(is_stdout(word.rpartition("=")[2]) for word in rest)
    try:
        # From the first line on: torch takes seconds to import, and a scheduler may not wait for it.
        with (
            stop_requests() if name == "train" else nullcontext(),
            redirect_stdout(sys.stderr) if is_taken else nullcontext(),
        ):
            status = _run(name, rest)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and hasattr(select, "poll") and not _is_read():
            sys.exit(UNREAD)
        end(of_a_file(error) or str(error), WRONG_INPUT, debug=debug)
    # A loss that is no number: another status, so that a scheduler does not start the same again.
    except FloatingPointError as error:
        end(str(error), DIVERGED, debug=debug)
    except (RuntimeError, MemoryError) as error:
        if not _is_lack_of_memory(error):
            raise
        what = str(error).strip().partition("\n")[0] or "There is not enough memory"
        end(f"{what.rstrip('.')}. {LESS_MEMORY}", WRONG_INPUT, debug=debug)
    except KeyboardInterrupt:
        end("stopped by the keyboard; finished files are kept, a training run goes on with --resume", KEYBOARD)
    sys.exit(status)


def _escape_what_cannot_be_encoded() -> None:
    """As stderr does: a label or a name need not fit a terminal of another encoding, or a pipe on Windows."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _is_lack_of_memory(error: RuntimeError | MemoryError) -> bool:
    # By name: what raised it has imported torch, which this file must not.
    is_named = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return is_named or isinstance(error, MemoryError)


def _is_read() -> bool:
    """Whether somebody still reads what is printed. Where nobody does, as behind `| head`, nothing more is written."""
    # The pipe itself is asked: what could not be written may be gone from the buffer, and flushing it succeeds.
    pipe = select.poll()
    with suppress(OSError):  # a notebook's stdout is no file
        pipe.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(event & select.POLLERR for _, event in pipe.poll(0)):
        return True
    # The interpreter flushes once more when it ends, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return False


def _without_command(name: str, rest: Sequence[str]) -> int:
    if name in HELP | {"--help-all"}:
        print(commands_help())
    elif name == "--version":
        print(f"re2tal {re2tal.__version__}")
    elif name == "--print-completion" and list(rest) in [[shell] for shell in SHELLS]:
        from re2tal.cli.completion import print_completion

        print_completion(rest[0])
    elif name == "--print-completion":
        end(f"--print-completion takes a shell: {', '.join(SHELLS)}", WRONG_INPUT)
    else:
        near = get_close_matches(name, COMMANDS, n=1)
        perhaps = f"; did you mean {near[0]!r}?" if near else ""
        end(f"unknown command {name!r}; known: {', '.join(COMMANDS)}{perhaps}", WRONG_INPUT)
    return 0


def _run(name: str, arguments: Sequence[str]) -> int:
    # Help and errors without a command must not import torch, which takes seconds.
    if name not in COMMANDS:
        return _without_command(name, arguments)
    if HELP & {*arguments}:
        print(short_help(name, arguments))
        return 0
    if "--help-all" in arguments:
        print(f"{examples(page_of(name, arguments))}\n")
    _refuse_without_values(arguments)
    # tyro knows only --help, and explains all options there.
    function, arguments = command(name, ["--help" if word == "--help-all" else word for word in arguments])
    status = parsed(function, arguments, prog=f"re2tal {name}")
    return 0 if status is None else status


def _refuse_without_values(arguments: Sequence[str]) -> None:
    """ValueError for an option of several values that has none: of `--classes $UNSET` all classes were taken."""
    for option, following in pairwise([*arguments, "--"]):
        if option.replace("_", "-") in SEVERAL_VALUES and following.startswith("--"):
            raise ValueError(f"{option} has no value; give one or more, or leave it out")


def command(name: str, arguments: Sequence[str]) -> tuple[Callable, Sequence[str]]:
    """The function of a command, and the arguments for it."""
    module, _, place = COMMANDS[name][0].partition(":")
    function = getattr(importlib.import_module(module), place)
    if name not in STARTING_POINTS:
        return function, arguments
    from re2tal.cli.starting_point import starting_point

    run, arguments = starting_point(arguments, default=STARTING_POINTS[name])
    return partial(function, run=run), arguments


def parsed(function: Callable, arguments: Sequence[str], *, prog: str) -> Any:
    """What `function` returns for the arguments, parsed by its signature."""
    import tyro

    return tyro.cli(function, args=arguments, prog=prog, config=(tyro.conf.AvoidSubcommands,), registry=own_types())


def own_types() -> ConstructorRegistry:
    """How values are read and shown: no path is empty, and 0.39999999999999997 in help, the published threshold to the
    last bit, is 0.4. The value stays what it is. A rule that gives None leaves a type to tyro's own.
    """
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def short(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[float] | None:
        if info.type is not float:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="FLOAT",
            instance_from_str=lambda given: float(given[0]),
            # A default may be written as a whole number.
            is_instance=lambda value: isinstance(value, float | int),
            str_from_instance=lambda value: [f"{value:.6g}"],
        )

    @registry.primitive_rule
    def named(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
        if info.type is not Path:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda given: _path(given[0]),
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _path(text: str) -> Path:
    # Most often of a variable of the shell that is not set; `Path` would take it for the folder at hand.
    if not text:
        raise ValueError("the path is empty; name a file or a folder")
    return Path(text)
