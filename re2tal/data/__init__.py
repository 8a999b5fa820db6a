"""From annotated videos to batches of clips."""
