"""From a stock residual network to rewired stages that the engine can run."""
