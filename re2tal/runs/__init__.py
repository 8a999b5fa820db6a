"""Training, detecting, evaluating, extracting and converting as functions, for Python callers and the command line.

`training_run.train` writes a run folder, everything else here reads one; `folder` names the files in it. Here `run` is
always the path of a run folder, and `config` a whole configuration. Functions return results; `cli` prints them.
"""
