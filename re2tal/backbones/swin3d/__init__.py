"""Video Swin: our own network, its windows and attention, and the names that other code bases give its weights."""
