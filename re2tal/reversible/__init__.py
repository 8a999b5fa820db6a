"""Running residual branches so that their activations can be forgotten: tensors and callables only."""

from re2tal.reversible.engine import run_reversibly

__all__ = ["run_reversibly"]
