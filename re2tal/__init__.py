"""End-to-end training of temporal action localization with rewired, reversible video backbones (Re2TAL, CVPR 2023).

    re2tal.rewire(model)                       # a stock network becomes reversible, in place
    re2tal.train(config)                       # a run folder, from a configuration
    re2tal.load_detector(folder).detect(path)  # actions in a video file, in seconds
    re2tal.evaluate(predictions, annotations)  # mean average precision

Everything is imported when it is first used, so `import re2tal` takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from re2tal.config import RecognitionConfig, RunConfig, load_run
    from re2tal.recipes import find_recipe
    from re2tal.rewire import RewireReport, RewiringConfig, rewire, unrewire
    from re2tal.runs.detector import Detector, FoundAction, load_detector
    from re2tal.runs.evaluation import Evaluated, ScoringOptions, evaluate
    from re2tal.runs.training_run import TrainedRun, train

    __version__: str

__all__ = [
    "Detector",
    "Evaluated",
    "FoundAction",
    "RecognitionConfig",
    "RewireReport",
    "RewiringConfig",
    "RunConfig",
    "ScoringOptions",
    "TrainedRun",
    "__version__",
    "evaluate",
    "find_recipe",
    "load_detector",
    "load_run",
    "rewire",
    "train",
    "unrewire",
]

_HOMES = {
    "Detector": "re2tal.runs.detector",
    "Evaluated": "re2tal.runs.evaluation",
    "FoundAction": "re2tal.runs.detector",
    "RecognitionConfig": "re2tal.config",
    "RewireReport": "re2tal.rewire",
    "RewiringConfig": "re2tal.rewire",
    "RunConfig": "re2tal.config",
    "ScoringOptions": "re2tal.runs.evaluation",
    "TrainedRun": "re2tal.runs.training_run",
    "evaluate": "re2tal.runs.evaluation",
    "find_recipe": "re2tal.recipes",
    "load_detector": "re2tal.runs.detector",
    "load_run": "re2tal.config",
    "train": "re2tal.runs.training_run",
    "unrewire": "re2tal.rewire",
}
"""Name -> the module it lives in. `rewire` is no row: it names a package too, which can be called."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("re2tal")
    elif name == "rewire":
        value = importlib.import_module("re2tal.rewire")
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 're2tal' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
