"""Who may import whom, read from the source with `ast`.

`BELOW` is the drawing of docs/architecture.md, one row a package; a package may import what is below it, at any depth.
`OWNERS` holds each heavy library to the modules that own it, so that the rest works, and starts fast, without it.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from re2tal.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1] / "re2tal"

LEAVES = ("structures", "files", "strict_json", "tables", "options", "video_ids", "machine", "progress")
"""What every package may import; of these only `strict_json` imports another, `files`."""

BELOW: dict[str, tuple[str, ...]] = {
    "structures": (),
    "files": (),
    "strict_json": ("files",),
    "tables": (),
    "options": (),
    "video_ids": (),
    "machine": (),
    "progress": (),
    "distributed": (),
    "reversible": (),
    "rewire": ("reversible",),
    "backbones": ("rewire",),
    "localizers": (),
    "data": (),
    "evaluation": (),
    "detector": ("backbones", "localizers"),
    "recognizer": ("backbones",),
    "extraction": ("backbones", "data"),
    "inference": ("data", "evaluation", "distributed"),
    "training": ("rewire", "data", "distributed"),
    "config": ("training", "detector", "recognizer", "evaluation"),
    "recipes": ("config",),
    "conversion": ("config",),
    "planning": ("config", "distributed"),
    "reporting": ("evaluation",),
    "viewer": ("data", "evaluation"),
    "runs": ("recipes", "conversion", "extraction", "planning", "reporting", "viewer", "inference", "distributed"),
    "cli": ("runs",),
    "__main__": ("cli",),
}

OWNERS: dict[str, tuple[str, ...]] = {
    "deepspeed": ("re2tal.training.deepspeed_import",),
    "accelerate": ("re2tal.training.trackers",),
    "decord": ("re2tal.data.streaming.decoders.by_decord",),
    "torchcodec": ("re2tal.data.streaming.decoders.by_torchcodec",),
    "webdataset": ("re2tal.data.contract.shards",),
    "transformers": ("re2tal.backbones.*",),
    "peft": ("re2tal.backbones.adapters.lora",),
    "av": ("re2tal.data.*",),
    "huggingface_hub": ("re2tal.runs.model_folder_card", "re2tal.runs.model_folder_hub"),
    "fsspec": ("re2tal.data.addresses.remote",),
    "aiohttp": ("re2tal.data.addresses.remote",),
    "h5py": ("re2tal.data.building.feature_files",),
    "matplotlib": ("re2tal.reporting.*",),
    "rich": ("re2tal.progress",),
    "tyro": ("re2tal.cli", "re2tal.cli.*"),
}

LIGHT = ("torch", "numpy", "pydantic", "safetensors")
"""Libraries that any module may import."""


def modules() -> list[str]:
    """Dotted names of all modules, a package by the name of its folder."""
    paths = (path.relative_to(ROOT.parent).with_suffix("") for path in ROOT.rglob("*.py"))
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)


def source_of(module: str) -> tuple[str, bool]:
    """Text of a module, and whether it is a package."""
    path = ROOT.parent.joinpath(*module.split("."))
    if path.is_dir():
        return (path / "__init__.py").read_text(), True
    return path.with_suffix(".py").read_text(), False


def imports(module: str, source: str, *, is_package: bool) -> Iterator[str]:
    """Absolute dotted names that `source` imports, anywhere in it: also in functions, under TYPE_CHECKING, and by
    `importlib.import_module` or `__import__` with a literal name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def may_import(package: str) -> set[str]:
    """The packages below `package`, at any depth, itself and the leaves included; the engine knows tensors only."""
    found = {package} if package in ("reversible", *LEAVES) else {package, *LEAVES}
    waiting = list(BELOW[package])
    while waiting:
        below = waiting.pop()
        if below not in found:
            found.add(below)
            waiting += BELOW[below]
    return found


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What `module` imports and should not, one sentence each."""
    found = []
    package = module.split(".")[1] if "." in module else ""
    for name in imports(module, source, is_package=is_package):
        top, _, rest = name.partition(".")
        if top == "re2tal":
            target = rest.split(".")[0]
            if package and target in BELOW and target not in may_import(package):
                found.append(f"{module} imports {name}: {package} may import {sorted(may_import(package))}")
            continue
        library = "tensorboard" if name.startswith("torch.utils.tensorboard") else top
        if library in sys.stdlib_module_names or library in LIGHT:
            continue
        owners = OWNERS.get(library, ())
        if not any(fnmatchcase(module, owner) for owner in owners):
            found.append(f"{module} imports {library}, which belongs to {owners or 'no module: add it to OWNERS'}")
    return found


@pytest.mark.parametrize("module", modules())
def test_imports_only_point_down_and_heavy_libraries_stay_in_their_modules(module: str) -> None:
    source, is_package = source_of(module)
    assert violations(module, source, is_package=is_package) == []


def test_every_package_has_its_row() -> None:
    packages = {module.split(".")[1] for module in modules() if "." in module}
    assert packages <= BELOW.keys(), "add a row to BELOW, and to docs/architecture.md"


def test_no_command_imports_another() -> None:
    """What two commands share is below them."""
    commands = {place.partition(":")[0] for place, _ in COMMANDS.values()}
    for command in commands:
        source, is_package = source_of(command)
        found = imports(command, source, is_package=is_package)
        assert not [name for name in found if {name, name.rpartition(".")[0]} & commands], command


def test_a_command_parses_and_calls() -> None:
    for module in modules():
        if module.startswith("re2tal.cli"):
            for function in ast.walk(ast.parse(source_of(module)[0])):
                if isinstance(function, ast.FunctionDef):
                    statements = function.body[1:] if ast.get_docstring(function) else function.body
                    assert statements[-1].end_lineno - statements[0].lineno < 30, f"{module}.{function.name}"


def test_siblings_and_engines_are_what_the_drawing_says() -> None:
    for one in ("localizers", "data", "evaluation"):
        assert may_import(one) == {one, *LEAVES}
    assert may_import("reversible") == {"reversible"}
    assert [package for package in BELOW if "config" in may_import(package)] == [
        "config",
        "recipes",
        "conversion",
        "planning",
        "runs",
        "cli",
        "__main__",
    ]
    assert {package for package in BELOW if "distributed" in BELOW[package]} == {
        "inference",
        "training",
        "planning",
        "runs",
    }


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("re2tal.data.streaming.windows", "from re2tal.evaluation.results import read_results", "data may import"),
        ("re2tal.localizers.x", "from re2tal import config", "localizers may import"),
        ("re2tal.localizers.x", "from ..data.contract import shards", "imports re2tal.data.contract.shards"),
        ("re2tal.backbones.x", "import re2tal.config", "backbones may import"),
        ("re2tal.reversible.x", "from re2tal.structures import Timeline", "reversible may import"),
        ("re2tal.evaluation.x", "def f():\n    import re2tal.distributed", "evaluation may import"),
        ("re2tal.data.x", "if TYPE_CHECKING:\n    from re2tal.training.trainer import Trainer", "data may import"),
        (
            "re2tal.data.x",
            "import importlib\nimportlib.import_module('re2tal.config')",
            "imports re2tal.config",
        ),
        ("re2tal.training.trainer", "import deepspeed.comm as dist", "deepspeed, which belongs to"),
        ("re2tal.data.streaming.stream", "from decord import VideoReader", "decord, which belongs to"),
        ("re2tal.training.x", "from torch.utils.tensorboard import SummaryWriter", "tensorboard, which belongs to"),
        ("re2tal.detector", "import pandas", "pandas, which belongs to no module: add it to OWNERS"),
    ],
)
def test_the_check_catches_a_violation(module: str, source: str, message: str) -> None:
    (found,) = violations(module, source)
    assert message in found


def test_the_check_lets_through_what_is_right() -> None:
    allowed = (
        "import torch.nn\nfrom .results import x\nfrom . import y\nfrom re2tal.structures import Action\nimport os.path"
    )
    assert violations("re2tal.evaluation.x", allowed) == []
    assert violations("re2tal.evaluation", "from . import results\nfrom .results import x", is_package=True) == []
    assert violations("re2tal.training.deepspeed_import", "import deepspeed") == []


def test_owned_libraries_are_installed_under_these_names() -> None:
    """A misspelt row would hold nothing. An extra need not be installed, but then pyproject.toml names it."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    extras = {re.split(r"[<>=]", one)[0] for names in project["optional-dependencies"].values() for one in names}
    assert OWNERS.keys() <= packages_distributions().keys() | extras


def test_owners_exist() -> None:
    found = modules()
    for library, owners in OWNERS.items():
        assert any(fnmatchcase(module, owner) for owner in owners for module in found), f"nobody can own {library}"
