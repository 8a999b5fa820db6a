"""Help: short and quick pages that say what the commands say, everything on request, and completion in a shell."""

from __future__ import annotations

import json
import resource
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from re2tal.cli import main
from re2tal.cli.commands import COMMANDS, EXAMPLES
from re2tal.cli.help import PAGES, short_help

SCRIPT = Path(__file__).parents[2] / "docs" / "write_help_pages.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def parsers(script):
    return dict(script["parsers"]())


def test_the_pages_are_what_the_commands_say(script, parsers):
    said = script["pages"](parsers.items())
    assert json.loads(PAGES.read_text()) == said, f"run `python docs/{SCRIPT.name}`"


def test_every_option_of_an_example_exists(parsers):
    known = {page: {flag for one in parser._actions for flag in one.option_strings} for page, parser in parsers.items()}
    assert known.keys() == EXAMPLES.keys()
    for page, examples in EXAMPLES.items():
        for example in examples:
            words = shlex.split(example)
            name, word = words[1], " ".join(words[1:3])
            assert words[0] == "re2tal"
            assert page in (name, word)
            flags = {one for one in words if one.startswith("--")} - {"--recipe", "--config", "--help"}
            assert flags <= known[word if word in known else name], example


@pytest.mark.parametrize("page", sorted(json.loads(PAGES.read_text())))
def test_a_page_opens_with_two_examples_and_has_at_most_ten_options_in_lines_that_fit(page, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    name, *rest = page.split(" ")
    lines = short_help(name, rest).splitlines()
    assert lines[0].startswith(f"usage: re2tal {page}")
    assert lines[2] == "examples:"
    assert all(line.startswith("  re2tal ") for line in lines[3:5])
    assert len(json.loads(PAGES.read_text())[page]["options"]) <= 10
    assert all(len(line) <= 80 for line in lines[5:] if not line.startswith("  --"))


def test_help_of_a_command_takes_less_than_a_second_and_no_torch():
    call = "try: main(['train', '--help'])\nfinally: assert 'torch' not in sys.modules"
    code = f"import sys; from re2tal.cli import main\n{call}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "re2tal train --help-all explains everything" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_all_options_come_with_help_all(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--help-all"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert printed.startswith("examples:\n  re2tal evaluate --predictions")
    assert "--bootstrap-seed" in printed


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_commands_and_options(shell, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "--min-score" in script


ASK = """
function=$(complete -p re2tal | sed 's/.*-F \\([^ ]*\\).*/\\1/')
for line in 're2tal det' 're2tal detect --min' 're2tal train --engine.mem'; do
    COMP_WORDS=($line) COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_LINE=$line COMP_POINT=${#line} COMPREPLY=()
    $function re2tal
    echo "${COMPREPLY[@]}"
done
"""


def test_bash_completes_a_command_and_an_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", "bash"])
    script = capsys.readouterr().out + ASK
    answered = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=False)
    assert answered.stdout.split() == ["detect", "--min-score", "--engine.memory-budget-gb"], answered.stderr
