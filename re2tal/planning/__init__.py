"""How much memory a training step needs, before anything is launched, and how to spend what there is."""
