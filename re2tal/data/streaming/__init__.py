"""From shards to batches of clips: epoch order, windows, frames, pixels."""
