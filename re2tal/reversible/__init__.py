"""The engine: forget activations on the way forward, rebuild them on the way back. Tensors and callables only."""
