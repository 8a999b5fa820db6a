"""The manifest of a checkpoint: no changed bit passes, no field out of its range, and old ones are still read."""

from __future__ import annotations

import json

import pytest

from re2tal.files import sha256_of
from re2tal.training.manifest import TrainingProgress, read_manifest, write_manifest

PROGRESS = TrainingProgress(step=8, micro_batches=9, skipped=1, seconds=1.5e-05)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "step-00000008"
    folder.mkdir()
    for name in ("mp_rank_00_model_states.pt", "rank-00000.pt"):
        (folder / name).write_bytes(name.encode())
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in folder.iterdir()}
    run = {"optimizer.learning_rate": 1e-05, "training.seed": 0, "name": "é", "training.average_decay": None}
    write_manifest(folder, run=run, progress=PROGRESS, files=files)
    return folder


def unsealed(checkpoint) -> dict:
    """As the versions before the seal wrote it."""
    document = json.loads((checkpoint / "manifest.json").read_text())
    del document["seal"]
    return {**document, "format": 1}


def test_what_was_written_is_read_again(checkpoint):
    manifest = read_manifest(checkpoint)
    assert (manifest.progress, manifest.sealed, manifest.run["name"]) == (PROGRESS, True, "é")


def test_every_single_flipped_bit_is_found(checkpoint, record_property):
    path = checkpoint / "manifest.json"
    whole = path.read_bytes()
    record_property("tried", 8 * len(whole))
    passed = []
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
            try:
                read_manifest(checkpoint)
                passed.append((place, bit))
            except ValueError:
                continue
    assert passed == []


def test_a_seal_cannot_be_left_out_or_put_on_another_content(checkpoint):
    path = checkpoint / "manifest.json"
    document = json.loads(path.read_text())
    for changed in (
        {key: value for key, value in document.items() if key != "seal"},
        {**document, "format": 1},
        {**document, "extra": 1},
        {**document, "progress": {**document["progress"], "skipped": 0}},
    ):
        path.write_text(json.dumps(changed) + "\n")
        with pytest.raises(ValueError, match=r"manifest\.json has (the keys|changed)"):
            read_manifest(checkpoint)


def test_a_manifest_from_before_the_seal_is_read_and_known_as_such(checkpoint):
    (checkpoint / "manifest.json").write_text(json.dumps(unsealed(checkpoint)) + "\n")
    manifest = read_manifest(checkpoint)
    assert (manifest.progress, manifest.sealed) == (PROGRESS, False)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("progress", "step", 0, r"has step = 0, its folder is called step-00000008"),
        ("progress", "step", "8", r"has step = '8', which must be a number"),
        ("progress", "step", 8.0, r"has step = 8.0, which must be a number"),
        ("progress", "step", True, r"has step = True, which must be a number"),
        ("progress", "skipped", -1, r"has skipped = -1, which must be a number"),
        ("progress", "micro_batches", 7, r"8 steps of 7 batches"),
        ("progress", "seconds", None, r"has seconds = None"),
        ("progress", "epoch", 3, r"something is missing or unknown"),
        ("files", "../../etc", {"bytes": 1, "sha256": "0" * 64}, r"not a plain name"),
        ("files", "rank-00000.pt", {"bytes": -1, "sha256": "0" * 64}, r"no size and SHA-256"),
        ("files", "rank-00000.pt", {"bytes": 13, "sha256": "xyz"}, r"no size and SHA-256"),
        ("files", "rank-00000.pt", [], r"no size and SHA-256"),
        ("files", "rank-00001.pt", {"bytes": 1, "sha256": "0" * 64}, r"rank-00001.pt is missing"),
        (None, "files", {}, r"names no file of a rank"),
        (None, "files", [], r"must be a dict"),
        (None, "run", None, r"must be a dict"),
        (None, "format", 3, r"has format 3"),
        (None, "format", True, r"has format True"),
    ],
)
def test_fields_of_an_unsealed_manifest_are_checked(checkpoint, part, key, value, message):
    document = unsealed(checkpoint)
    (document if part is None else document[part])[key] = value
    (checkpoint / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        read_manifest(checkpoint)
