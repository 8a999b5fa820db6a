"""What a run is, callable from Python: training, what a trained run finds, what it is worth, its weights and features.

A run folder is what `training_run.train` writes and everything else here reads; `folder` names the files in it.
The command line parses and calls these; nothing here parses arguments.
"""
