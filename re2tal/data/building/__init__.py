"""From videos, annotations and features of other programs to shards."""
