"""The DeepSpeed files that the package brings, by name; a path names any other file."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "ds_configs"
"""Package data, and so there in an installed package; ds_configs/ of the repository holds the same files."""
DEFAULT_PRESET = "zero2"


def presets() -> list[str]:
    """The names."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def find_preset(name_or_path: Path | str) -> Path:
    """The file of a preset, or the path that was given, which has a suffix or a folder in it, or is a file."""
    text = str(name_or_path)
    # A preset wins over a file of that name in the working directory: the same command means the same everywhere.
    if text in presets():
        return FOLDER / f"{text}.json"
    path = Path(text)
    if path.suffix or path.name != text or path.is_file():
        return path
    raise ValueError(
        f"{text} is neither a preset nor a DeepSpeed file; presets are {', '.join(presets())}; give a file of your own "
        "by its path"
    )
