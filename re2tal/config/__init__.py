"""Everything that makes a run, composed of the components' own configurations, and its JSON form."""

from re2tal.config.build import build_detector, build_recognizer, check_start_wiring
from re2tal.config.file import load_config, load_run, save_config, to_json
from re2tal.config.schema import RUNS, AnyRun, DataConfig, RecognitionConfig, RunConfig, SharedConfig
from re2tal.options import flatten

__all__ = [
    "RUNS",
    "AnyRun",
    "DataConfig",
    "RecognitionConfig",
    "RunConfig",
    "SharedConfig",
    "build_detector",
    "build_recognizer",
    "check_start_wiring",
    "flatten",
    "load_config",
    "load_run",
    "save_config",
    "to_json",
]
