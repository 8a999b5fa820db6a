"""SlowFast: our own network, and the names that other code bases give its weights."""
