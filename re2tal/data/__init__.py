"""From annotated videos to batches of clips."""

import os

# Read by webdataset when it is imported: no shell commands and no pickles, whatever a shard or its name holds.
os.environ["WDS_SECURE"] = "1"
