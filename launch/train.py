"""Train a detector: `deepspeed launch/train.py --ds zero2`, or with torchrun, srun or plain python.

The same as `re2tal train`; launchers want a file. `--help` tells the options, `re2tal recipes` the recipes.
"""

import sys

from re2tal.cli import main
from re2tal.training.signals import stop_requests

if __name__ == "__main__":
    listening = stop_requests()  # kept, so that a signal while the interpreter ends does not spoil the exit status
    listening.__enter__()
    main(["train", *sys.argv[1:]])
