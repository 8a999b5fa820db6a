"""`re2tal view` on the terminal."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path

import pytest

from re2tal.cli import main
from re2tal.viewer.server import ViewerServer


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results on one video; serving ends at once, as if by Ctrl-C."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ViewerServer, "serve_forever", stop)
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"results": {"v": [{"segment": [0, 1], "label": "run", "score": 0.5}]}}))
    return path


def test_the_address_is_printed_and_opened(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or True)
    with pytest.raises(SystemExit) as ended:
        main(["view", str(results), "--port", "0"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert len(opened) == 1
    assert f"1 video on {opened[0]}\n" in printed
    assert printed.endswith("stopped\n")


def test_without_a_browser_it_says_how_to_come_here(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    monkeypatch.setenv("DISPLAY", ":0")
    with pytest.raises(SystemExit):
        main(["view", str(results), "--port", "0"])
    assert "ssh -L" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["view", str(results), "--port", "0", "--no-open"])
    assert "ssh -L" not in capsys.readouterr().out


def test_what_is_wrong_ends_in_one_line(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["view", str(results.with_name("gone.json"))])
    assert ended.value.code == 2
    assert "gone.json does not exist; give the folder of a run, or a results JSON" in capsys.readouterr().err
