"""The columns beside an index: they change nothing but the cost, and belong to one index only."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from data.folders import indexed, write_shards
from data.numbered import encode_numbered

from re2tal.data.contract.columns import ROW, MappedIndex, columns_of, columns_path, write_columns
from re2tal.data.contract.commit import commit
from re2tal.data.contract.manifest import INDEX_NAME, MANIFEST_NAME, to_json
from re2tal.data.contract.shards import ShardSet, open_shards
from re2tal.data.contract.verify import damage
from re2tal.data.streaming.stream import ClipConfig, stream_clips
from re2tal.data.streaming.windows import Slide
from re2tal.files import sha256_of
from re2tal.structures import Action

LENGTHS = (40, 61, 100, 33, 90)
CLIPS = ClipConfig(windowing=Slide(16, frames_per_second=15), size=32, workers=0)


@pytest.fixture
def plain(tmp_path) -> ShardSet:
    """Without columns."""
    videos = {f"v{n}": (encode_numbered(k), indexed(k, actions=[Action(0.2, 0.9, "x")])) for n, k in enumerate(LENGTHS)}
    return write_shards(tmp_path / "training", videos, per_shard=2)


@pytest.fixture
def mapped(plain) -> ShardSet:
    return add_columns(plain)


def add_columns(shards: ShardSet) -> ShardSet:
    lines = (shards.root / INDEX_NAME).read_bytes().splitlines(keepends=True)
    write_columns(shards.root, shards.videos, lines, index_sha256=shards.manifest.index_sha256)
    return open_shards(shards.root)


def test_entries_and_columns_are_those_of_the_index_read_whole(plain):
    mapped = add_columns(plain)
    assert isinstance(plain.videos, tuple)
    assert isinstance(mapped.videos, MappedIndex)
    assert len(mapped.videos) == 5
    assert tuple(mapped.videos) == plain.videos == mapped.videos[:]
    assert (mapped.videos[-1], mapped.videos[1:3]) == (plain.videos[-1], plain.videos[1:3])
    with pytest.raises(IndexError):
        mapped.videos[5]
    assert mapped.by_id == plain.by_id
    for name in ("num_samples", "samples_per_second", "shard"):
        assert np.array_equal(columns_of(mapped.videos)[name], columns_of(plain.videos)[name])
    assert tuple(pickle.loads(pickle.dumps(mapped)).videos) == plain.videos


@pytest.mark.parametrize("training", [True, False])
def test_batches_are_the_same_with_and_without_columns(plain, training):
    streams = [stream_clips(s, CLIPS, batch_size=2, training=training) for s in (plain, add_columns(plain))]
    for one, other in zip(*(stream.epoch(1) for stream in streams), strict=True):
        assert (one.video_ids, one.timelines, one.actions) == (other.video_ids, other.timelines, other.actions)
        assert bool((one.frames == other.frames).all())


def test_an_index_that_was_changed_since_is_refused_with_columns_too(mapped):
    index = mapped.root / INDEX_NAME
    index.write_bytes(index.read_bytes().replace(b'"x"', b'"y"'))
    with pytest.raises(ValueError, match=r"is not the one that manifest\.json was written for"):
        open_shards(mapped.root)
    os.utime(index, ns=(0, 0))  # a change that hides its time: what is read is checked, and verify reads all
    opened = open_shards(mapped.root)
    with pytest.raises(ValueError, match=r"index\.jsonl line 1 is not what the columns beside it say"):
        opened.videos[0]
    assert "is not the one that manifest.json was written for" in next(iter(damage(mapped)))


def rows(shards: ShardSet) -> np.ndarray:
    return np.load(columns_path(shards.root, shards.manifest.index_sha256))


def change(name: str, place: int, value: int):
    def changed(values: np.ndarray) -> np.ndarray:
        values[name][place] = value
        return values

    return changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (change("shard", 0, 2**31 - 1), "lists 5 videos in 4 shards"),
        (change("shard", 0, -1), "lists 5 videos in 4 shards"),
        (change("shard", 0, 2), "lists 5 videos in 3 shards"),
        (change("num_samples", 0, 2**40), "holds 5 videos of"),
    ],
)
def test_columns_that_do_not_fit_are_refused(mapped, changed, message):
    path = columns_path(mapped.root, mapped.manifest.index_sha256)
    np.save(path, changed(rows(mapped)))
    with pytest.raises(ValueError, match=message):
        open_shards(mapped.root)


def saved(values: np.ndarray) -> bytes:
    file = BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


def zipped(values: np.ndarray) -> bytes:
    file = BytesIO()
    np.savez(file, values)
    return file.getvalue()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda values: b"",
        lambda values: b"junk" * 100,
        lambda values: saved(values)[:200],
        lambda values: saved(values).replace(b"'descr': [", b"'descr': [(", 1),
        lambda values: saved(values).replace(b"'shape'", b"'shap", 1),
        lambda values: saved(values)[:10] + bytes(118) + saved(values)[128:],
        lambda values: zipped(values),
        lambda values: saved(np.array([{"a": 1}], object)),
        lambda values: saved(values[:-1]),
        lambda values: saved(values["start"].copy()),
        lambda values: saved(change("start", -1, 7)(values)),
        lambda values: saved(values[["start", "num_samples", "samples_per_second", "shard"]]),  # of earlier versions
    ],
)
def test_columns_that_are_damaged_or_of_another_index_are_not_used(mapped, spoil, caplog):
    path = columns_path(mapped.root, mapped.manifest.index_sha256)
    videos = tuple(mapped.videos)
    path.write_bytes(spoil(rows(mapped)))
    opened = open_shards(mapped.root)
    assert opened.videos == videos
    assert f"{path} is not used, and the index is read whole" in caplog.text
    index = mapped.root / INDEX_NAME
    index.write_bytes(index.read_bytes().replace(b'"x"', b'"y"'))
    os.utime(index, ns=(0, 0))
    with pytest.raises(ValueError, match=r"is not the one that manifest\.json was written for"):
        open_shards(mapped.root)


@pytest.mark.parametrize("name", ["num_samples", "samples_per_second", "shard", "id", "crc32"])
def test_every_column_is_compared_with_the_line_that_is_used(mapped, name):
    values = rows(mapped)
    values[name][[1, 2]] = values[name][[2, 1]] if name != "samples_per_second" else (29.0, 31.0)
    np.save(columns_path(mapped.root, mapped.manifest.index_sha256), values)
    opened = open_shards(mapped.root)
    assert opened.videos[0] == mapped.videos[0]
    with pytest.raises(ValueError, match=r"index\.jsonl line 2 is not what the columns beside it say"):
        opened.videos[1]
    lines = [line for line in damage(opened) if "columns beside it" in line]
    assert [line.split(" is not")[0][-6:] for line in lines] == ["line 2", "line 3"]


def test_an_id_that_is_there_twice_is_refused_with_columns_too(mapped):
    videos = list(mapped.videos)
    videos[4] = replace(videos[4], record=replace(videos[4].record, video_id="v1"))
    lines = [(to_json(video) + "\n").encode() for video in videos]
    (mapped.root / INDEX_NAME).write_bytes(b"".join(lines))
    index_sha256 = sha256_of(mapped.root / INDEX_NAME)
    manifest = replace(mapped.manifest, index_sha256=index_sha256)
    (mapped.root / MANIFEST_NAME).write_text(to_json(manifest))
    write_columns(mapped.root, videos, lines, index_sha256=index_sha256)
    with pytest.raises(ValueError, match="'v1' is listed twice"):
        open_shards(mapped.root)
    assert any("'v1' is listed twice" in line for line in damage(replace(mapped, videos=tuple(videos))))


def test_a_line_that_the_columns_place_elsewhere_is_noticed(mapped):
    path = columns_path(mapped.root, mapped.manifest.index_sha256)
    values = rows(mapped)
    values["start"][1] += 1
    np.save(path, values)
    with pytest.raises(ValueError, match=r"index\.jsonl line 2"):
        open_shards(mapped.root).videos[1]
    values["start"][1] -= 1
    values["num_samples"][[0, 1]] = values["num_samples"][[1, 0]]
    np.save(path, values)
    with pytest.raises(ValueError, match="line 1 is not what the columns beside it say"):
        open_shards(mapped.root).videos[0]


def test_a_folder_of_fewer_videos_still_streams(mapped):
    few = mapped.only(["v3", "v0"])
    assert [video.record.video_id for video in few.videos] == ["v3", "v0"]
    batch = next(stream_clips(few, replace(CLIPS, fit="stretch"), batch_size=2, training=False).epoch(0))
    assert batch.video_ids == ("v3", "v3")


def test_a_build_leaves_the_columns_of_its_index_only(mapped):
    Path(mapped.root / "index.0123456789abcdef.npy").write_bytes(b"old")
    Path(mapped.root / "index.0123456789abcdef.jsonl").write_bytes(b"of a change that was broken off")
    commit(mapped.root, [*mapped.videos], lambda index_sha256: replace(mapped.manifest, index_sha256=index_sha256))
    assert [path.name for path in mapped.root.glob("index.*.*")] == [
        columns_path(mapped.root, mapped.manifest.index_sha256).name
    ]
    assert rows(mapped).dtype == ROW


def test_a_change_that_is_broken_off_leaves_the_old_state_or_the_new_one(mapped, monkeypatch):
    """Whatever write of the four is the last one that happens."""
    old = [video.record.video_id for video in mapped.videos]
    fewer = [*mapped.videos][:-1]
    frames, seconds = sum(v.num_frames for v in fewer), sum(v.video_seconds for v in fewer)
    totals = replace(mapped.manifest.totals, videos=len(fewer), frames=frames, seconds=seconds)
    shards = [replace(s, videos=sum(v.shard == s.name for v in fewer)) for s in mapped.manifest.shards]
    used = tuple(shard for shard in shards if shard.videos)

    def manifest(index_sha256: str):
        return replace(mapped.manifest, totals=totals, shards=used, index_sha256=index_sha256)

    rename, states = os.replace, []
    for last in range(5):
        root = Path(shutil.copytree(mapped.root, mapped.root.parent / f"broken-{last}"))
        calls = itertools.count()

        def replacing(source, target, calls=calls, last=last):
            if next(calls) == last:
                raise KeyboardInterrupt
            rename(source, target)

        monkeypatch.setattr(os, "replace", replacing)
        with contextlib.suppress(KeyboardInterrupt):
            commit(root, fewer, manifest)
        monkeypatch.setattr(os, "replace", rename)
        shards_now = open_shards(root)
        assert shards_now.videos[0].record == mapped.videos[0].record
        states.append(len(shards_now.videos))
    assert states == [len(old)] * 3 + [len(fewer)] * 2
