"""`re2tal rewire` prints what was rewired, and counts memory as autograd and the engine spend it."""

from __future__ import annotations

import pytest

from re2tal.cli import main


def test_report_parameters_and_memory_are_printed(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["rewire", "timesformer_nano", "--segment", "3", "--frames", "8"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("timesformer_nano: 0.1 million parameters; 48 channels every frame\n")
    assert "encoder.model.encoder.layer  4       4        temporal attention + spatial attention + mlp" in printed
    assert "kept from forward to backward for 8 frames of 32 x 32, float32: 2.04 MiB plain, 0." in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "unknown backbone 'nowhere'; known: ["),
        (
            ["vivit_nano", "--weights", "/no/such/folder"],
            "'/no/such/folder' is neither a file, a folder nor a hub name",
        ),
        (["vivit_nano", "--frames", "0"], "--frames is 0; give 1 or more"),
        (["vivit_nano", "--size", "32", "0"], "--size is 0; give 1 or more"),
        (["vivit_nano", "--size", "30", "32"], "patches of 8 x 8 pixels, which 30 x 32 is no multiple of"),
    ],
)
def test_wrong_input_is_one_line_and_exit_status_2(capsys, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["rewire", *arguments])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
