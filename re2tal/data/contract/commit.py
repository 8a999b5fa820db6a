"""Put a new index and manifest in the place of those of a folder: a reader sees the old state or the new one.

index.{sha256}.jsonl, index.{sha256}.npy    written first; no reader looks for them yet
manifest.json                               replaced: from now on the new state holds
index.jsonl                                 replaced; until then readers take index.{sha256}.jsonl
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from re2tal.data.contract.columns import columns_path, new_index_path, write_columns
from re2tal.data.contract.feature_manifest import FeatureManifest, IndexedFeatures
from re2tal.data.contract.manifest import INDEX_NAME, MANIFEST_NAME, IndexedVideo, Manifest, to_json
from re2tal.files import write_atomically


def commit(
    root: Path,
    entries: Sequence[IndexedVideo] | Sequence[IndexedFeatures],
    make_manifest: Callable[[str], Manifest | FeatureManifest],
) -> None:
    """Write the index of these entries and the manifest that `make_manifest` gives for its checksum."""
    lines = [(to_json(entry) + "\n").encode() for entry in entries]
    index = b"".join(lines)
    index_sha256 = hashlib.sha256(index).hexdigest()
    new, columns = new_index_path(root, index_sha256), columns_path(root, index_sha256)
    write_atomically(new, index.decode())
    write_columns(root, entries, lines, index_sha256=index_sha256)
    write_atomically(root / MANIFEST_NAME, to_json(make_manifest(index_sha256)))
    with suppress(FileNotFoundError):  # another part of the build has done the same
        os.replace(new, root / INDEX_NAME)
    # Last: until the manifest was replaced, these were the ones that it named.
    for old in (*root.glob("index.*.npy"), *root.glob("index.*.jsonl")):
        if old != columns:
            old.unlink(missing_ok=True)
