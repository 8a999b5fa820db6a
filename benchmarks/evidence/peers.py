"""Part `peers`: reference vectors that other programs wrote, all counted, and times against other implementations."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from evidence.cells import REPOSITORY, Cell, Figures, Options, table
from evidence.costs import script

TESTS = REPOSITORY / "tests" / "parity"
# pytest's: all passed, some failed. Others mean that it could not run.
PASSED_OR_FAILED = (0, 1)


def reference_vectors() -> Figures:
    """Runs `tests/parity`; by module: what it compares, and how many of its tests passed, failed and were skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(TESTS)],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode not in PASSED_OR_FAILED:
            raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-1500:]}{done.stderr[-500:]}")
        return {**counted(ElementTree.parse(report).getroot()), "files": len(_vector_files())}


def counted(report: ElementTree.Element) -> Figures:
    """The same, from the XML that pytest writes."""
    modules: dict[str, Counter[str]] = {}
    failed = []
    for case in report.iter("testcase"):
        module = case.attrib["classname"].rpartition(".")[2]
        outcome = "skipped" if case.find("skipped") is not None else "passed"
        if case.find("failure") is not None or case.find("error") is not None:
            outcome = "failed"
            failed.append(f"{module}::{case.attrib['name']}")
        modules.setdefault(module, Counter())[outcome] += 1
    return {"modules": {name: {"about": _about(name), **counts} for name, counts in modules.items()}, "failed": failed}


def _vector_files() -> list[Path]:
    """What the tests read; the tests themselves know where it lies."""
    sys.path.insert(0, str(TESTS.parent))
    try:
        from parity.vectors import vectors_dir
    finally:
        sys.path.remove(str(TESTS.parent))
    return [path for path in vectors_dir().iterdir() if path.suffix != ".md"]


def _about(module: str) -> str:
    docstring = ast.get_docstring(ast.parse((TESTS / f"{module}.py").read_text())) or module
    return docstring.splitlines()[0].removesuffix(".")


def cells(options: Options) -> dict[str, Cell]:
    """`quick` has the same vectors, and shorter times."""
    quick = ("--quick",) if options.quick else ()
    mark = " (quick)" * options.quick
    return {
        "reference vectors": reference_vectors,
        f"soft-NMS{mark}": partial(script, "soft_nms", *quick),
        f"evaluation{mark}": partial(script, "evaluation", *quick),
        # Whole, it reads hours of video and an index of a million, which are claims of streaming.
        "data path": partial(script, "data", "--quick"),
    }


def show(done: Mapping[str, Figures], _: Path) -> list[str]:
    """Counts by module, then times."""
    lines: list[str] = []
    if "reference vectors" in done:
        modules, failed = done["reference vectors"]["modules"], done["reference vectors"]["failed"]
        outcomes = ("passed", "failed", "skipped")
        rows = [(one["about"], *(str(one.get(name, 0)) for name in outcomes)) for one in modules.values()]
        rows.append(("all", *(str(sum(one.get(name, 0) for one in modules.values())) for name in outcomes)))
        lines += [
            f"{done['reference vectors']['files']} files of reference vectors hold inputs, weights and outputs that "
            "the peers' own code wrote. Each test compares one network, detector, file or operation with them, within "
            "the rounding of its number format; a vector that no test reads fails one. The repository has one of each "
            "kind in `tests/parity/vectors`; `$RE2TAL_PARITY_DIR` names another folder.",
            "",
            *table(("what is compared", *outcomes), rows),
            *(f"- failed: `{name}`" for name in failed),
            "",
        ]
    rows = []
    for key, figures in done.items():
        if key.startswith("soft-NMS"):
            rows += [
                (f"suppression, {load}", "a quadratic loop in C++", f"{row['cpu_ms'] / row['compiled_cpu_ms']:.3f}")
                for load, row in figures.items()
                if isinstance(row, dict) and "compiled_cpu_ms" in row
            ]
        elif key.startswith("evaluation"):
            load = f"mAP of {figures['small']['predictions']:,} predictions"
            rows.append((load, "the definition, in Python", f"{1 / figures['small']['speedup']:.4f}"))
        elif key == "data path":
            for peer in ("decord", "torchcodec"):
                if f"path_vs_{peer}" in figures:
                    rows.append(("training clips of 256 frames", f"{peer} alone", f"{figures[f'path_vs_{peer}']:.2f}"))
    if rows:
        lines += [
            "Processor time of ours / of another implementation on the same input, in one run (mAP: by the clock). A",
            "peer's compiled suppression is such a loop; decoders give frames only, where ours also crops and batches.",
            "",
            *table(("what", "against", "ours / theirs"), rows),
            "",
        ]
    return [
        *lines,
        "OpenTAD's step and the released ActionFormer's were measured beside ours outside this command:",
        "[comparison.md](comparison.md#memory-and-time-measured-side-by-side),",
        "[results.md](results.md#a-training-step-on-features-against-the-released-actionformer).",
    ]
