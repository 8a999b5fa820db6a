"""Videos and shards at addresses, from a server on this machine."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from data.folders import indexed, write_shards
from data.numbered import encode_numbered
from data.served import Server, served
from fsspec.implementations.memory import MemoryFileSystem

from re2tal.config import RunConfig, load_config, save_config
from re2tal.data.addresses import remote
from re2tal.data.addresses.address import Address, as_address, folder_address
from re2tal.data.addresses.cache import Cache
from re2tal.data.addresses.remote import RemoteError, check_ranges, describe, read_range
from re2tal.data.addresses.shared import CachedRange, local_copy
from re2tal.data.contract.shards import ShardSet, open_any, open_shards, subset_folder
from re2tal.data.contract.verify import damage
from re2tal.data.streaming.stream import ClipConfig, stream_clips
from re2tal.data.streaming.windows import Slide
from re2tal.runs.video_files import find_videos
from re2tal.runs.viewing import ViewOptions, open_viewer
from re2tal.structures import Action

LENGTHS = (40, 61, 100, 33)
CLIPS = ClipConfig(windowing=Slide(32, frames_per_second=15), size=48, fit="stretch", workers=0)
CONTENT = np.random.default_rng(0).integers(0, 256, 20_000, dtype=np.uint8).tobytes()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, and no waiting."""
    monkeypatch.setenv("RE2TAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.0)


@pytest.fixture
def server() -> Iterator[Server]:
    with served({"/a.bin": CONTENT}) as running:
        yield running


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    videos = {
        f"v{number}": (encode_numbered(length), indexed(length, actions=[Action(0.2, 0.9, "x")]))
        for number, length in enumerate(LENGTHS)
    }
    return write_shards(tmp_path_factory.mktemp("shards") / "validation", videos, per_shard=2)


@pytest.mark.parametrize("url", ["https://h.org/a/b.mp4", "s3://bucket/a b.mp4", "hf://datasets/o/n/x", "gs://b/k"])
def test_an_address_is_the_same_as_text_and_as_a_path(url: str) -> None:
    address = as_address(url)
    assert address is not None
    assert as_address(Path(url)) == address == Address(url)
    assert str(address) == url
    assert pickle.loads(pickle.dumps(address)) == address


@pytest.mark.parametrize("path", ["a/b.mp4", "/x/my::clip.mp4", "C:/x.mp4", "C:\\x.mp4", "a: b.mp4", "-", "pipe:cat x"])
def test_what_is_no_address_is_a_path_here(path: str) -> None:
    assert as_address(path) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("pipe://cat /etc/passwd", "addresses that begin with pipe: are not read; give one of http://, https://"),
        ("file:///etc/passwd", "addresses that begin with file: are not read"),
        (Path("file:///etc/passwd"), "addresses that begin with file: are not read"),
        ("local://etc/passwd", "addresses that begin with local: are not read"),
        ("memory://x", "addresses that begin with memory: are not read"),
        ("simplecache::https://h.org/a", "is no address that can be read"),
        ("filecache::file://etc/passwd", "is no address that can be read"),
        ("https://h.org/zip::file://etc/passwd", "does not name one file or folder; .* without ::"),
        ("zip://a::s3://bucket/b.zip", "addresses that begin with zip: are not read"),
        ("https://h.org", "does not name one file"),
        ("https://h.org/a\nb", r"has a space or a control character in it"),
        ("https://h.org/a b", r"has a space or a control character in it"),
        ("s3://bucket/key?versionId=1", "has a question mark in it"),
    ],
)
def test_other_schemes_and_chains_are_refused(given: str | Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_address(given)


@pytest.mark.parametrize(
    "given", ["https://ann:hunter2@h.org/a", "ftp://ann:hunter2@h.org/a", "x::https://ann:hunter2@h.org/a?s=hunter2"]
)
def test_a_password_in_an_address_is_refused_and_not_shown(given: str) -> None:
    with pytest.raises(ValueError) as refused:
        as_address(given)
    assert "hunter2" not in str(refused.value)


def test_a_signed_address_is_shown_without_its_signature() -> None:
    address = as_address("https://h.org/v/party%20one.mp4?sig=hunter2#t=3")
    assert address is not None
    assert (str(address), f"{address!r}", address.name, address.stem) == (
        "https://h.org/v/party%20one.mp4?...",
        "https://h.org/v/party%20one.mp4?...",
        "party one.mp4",
        "party one",
    )
    with pytest.raises(ValueError, match="a folder's address cannot be signed") as refused:
        folder_address(address.url)
    assert "hunter2" not in str(refused.value)


def test_a_range_is_asked_for_once_and_then_kept(server: Server) -> None:
    address = Address(f"{server.address}/a.bin")
    part = CachedRange(address, 5_000, 700, len(CONTENT), 1)
    assert part.read() == part.read() == CONTENT[5_000:5_700]
    assert server.asked == [("GET", "/a.bin", "bytes=5000-5699")]
    assert replace(part, version=2).read() == part.read()
    assert len(server.asked) == 2
    part.forget()
    assert part.read() == CONTENT[5_000:5_700]
    assert len(server.asked) == 3


def test_what_passes_by_itself_is_tried_again(server: Server) -> None:
    address = Address(f"{server.address}/a.bin")
    server.statuses, server.cuts = [503, 429], 1
    assert read_range(address, 10, 100, file_bytes=len(CONTENT)) == CONTENT[10:110]
    assert len(server.asked) == 4


@pytest.mark.parametrize(
    ("statuses", "cuts", "message", "num_asked"),
    [
        ([403], 0, r"a\.bin\?\.\.\.: status 403; these credentials, or none, give no access", 1),
        ([401], 0, r"status 401; it wants credentials", 1),
        ([410], 0, r"status 410; check the address", 1),
        ([500] * 9, 0, r"status 500; the server fails; try again later", 4),
        ([], 9, r"no answer, or one that ended early \(ClientPayloadError\), 4 times; check the address and", 4),
    ],
)
def test_an_error_names_address_status_and_remedy(
    server: Server, statuses: list[int], cuts: int, message: str, num_asked: int
) -> None:
    server.statuses, server.cuts = statuses, cuts
    with pytest.raises(RemoteError, match=message) as failed:
        read_range(Address(f"{server.address}/a.bin?sig=hunter2"), 10, 100, file_bytes=len(CONTENT))
    assert "hunter2" not in str(failed.value)
    assert failed.value.__cause__ is None
    assert len(server.asked) == num_asked


def test_nobody_there_and_nothing_there(server: Server) -> None:
    with pytest.raises(RemoteError, match=r"b\.bin: status 404; check the address"):
        describe(Address(f"{server.address}/b.bin"))
    with pytest.raises(RemoteError, match=r"127\.0\.0\.1:9/x: no answer, .* \(ClientConnectorError\), 4 times"):
        describe(Address("http://127.0.0.1:9/x"))


def fetched(address: Address) -> bytes:
    with local_copy(address) as copy:
        assert all(0 < share <= 1 for share in copy.fetch())
        return copy.path.read_bytes()


def test_a_file_comes_in_ranges_and_is_kept(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "CHUNK", 6_000)
    address = Address(f"{server.address}/a.bin")
    server.cuts = 1
    assert fetched(address) == CONTENT
    ranges = [f"bytes={first}-{min(first + 5_999, 19_999)}" for first in range(0, 20_000, 6_000)]
    assert [one[1] for one in server.gets()] == [ranges[0], *ranges]
    assert fetched(address) == CONTENT
    assert len(server.gets()) == 5
    server.etag, server.files["/a.bin"] = "2", CONTENT[::-1]
    assert fetched(address) == CONTENT[::-1]
    assert list((tmp_path / "cache" / "in-use").iterdir()) == []


@pytest.mark.parametrize("cuts", [0, 3])
def test_a_file_comes_whole_where_there_are_no_ranges(
    server: Server, monkeypatch: pytest.MonkeyPatch, cuts: int
) -> None:
    monkeypatch.setattr(remote, "CHUNK", 6_000)
    server.ranges, server.etag, server.cuts = False, None, cuts
    assert fetched(Address(f"{server.address}/a.bin")) == CONTENT


@pytest.mark.parametrize(
    ("shift", "head_bytes", "message"),
    [
        (100, None, "sent bytes from 5900 on, asked for those from 6000 on"),
        (0, 13_000, "has 20000 bytes, and 13000 were expected"),
    ],
)
def test_an_answer_that_is_another_part_or_of_a_longer_file_is_an_error(
    server: Server, monkeypatch: pytest.MonkeyPatch, shift: int, head_bytes: int | None, message: str
) -> None:
    monkeypatch.setattr(remote, "CHUNK", 6_000)
    server.shift, server.head_bytes = shift, head_bytes
    with pytest.raises(RemoteError, match=rf"a\.bin.* {message}"):
        fetched(Address(f"{server.address}/a.bin"))


def test_an_answer_without_a_length_is_taken_only_where_its_end_is_marked(server: Server) -> None:
    server.ranges, server.etag, server.says_length, server.is_chunked = False, None, False, True
    address = Address(f"{server.address}/a.bin")
    with local_copy(address) as copy:
        assert list(copy.fetch())
        assert copy.path.read_bytes() == CONTENT
        server.cuts = 99  # more than all tries, those of the library within each of ours too
        with pytest.raises(RemoteError, match="no answer, or one that ended early"):
            list(copy.fetch())
        server.is_chunked = False
        with pytest.raises(RemoteError, match="does not say how long the file is, so a part of it would pass"):
            list(copy.fetch())


def test_content_that_changes_meanwhile_is_an_error(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CHUNK", 6_000)
    with local_copy(Address(f"{server.address}/a.bin")) as copy:
        shares = copy.fetch()
        assert next(shares) == 0.3
        server.etag = "2"
        with pytest.raises(RemoteError, match="changed while it was read; try again"):
            list(shares)


def test_shards_on_a_server_without_ranges_or_of_another_size_are_refused(server: Server) -> None:
    address = Address(f"{server.address}/a.bin")
    check_ranges(address, file_bytes=len(CONTENT))
    with pytest.raises(RemoteError, match=r"has 20000 bytes, the manifest says 20001: it was cut or changed"):
        check_ranges(address, file_bytes=len(CONTENT) + 1)
    server.ranges = False
    with pytest.raises(RemoteError, match=r"a\.bin: the server sends files only whole"):
        check_ranges(address, file_bytes=len(CONTENT))


def test_the_cache_stays_within_its_bytes_and_drops_the_oldest_use(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100_000)
    kept = tmp_path / "kept"
    for number in range(200):
        cache.write(f"k{number}", bytes([number]) * 1_000)
        os.utime(kept / f"k{number}", ns=(number, number))
        cache.read("k0")  # its time is now
        assert sum(path.stat().st_size for path in kept.iterdir()) <= 100_000
    assert cache.read("k0") == bytes(1_000)
    assert cache.read("k199") == bytes([199]) * 1_000
    assert cache.read("k1") is None
    cache.write("large", bytes(50_000))
    assert cache.read("large") is None


def test_damage_in_the_cache_is_seen(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100_000)
    cache.write("k", b"sound")
    (tmp_path / "kept" / "k").write_bytes(b"sOund" + (tmp_path / "kept" / "k").read_bytes()[5:])
    assert cache.read("k") is None
    assert not (tmp_path / "kept" / "k").exists()


def test_those_who_share_a_cache_never_see_half_a_file(tmp_path: Path) -> None:
    ended, wrong = threading.Event(), []

    def read() -> None:
        cache = Cache(tmp_path, 10**9)
        while not ended.is_set():
            if (content := cache.read("k")) not in (None, b"a" * 10**5, b"b" * 10**5):
                wrong.append(content)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    cache = Cache(tmp_path, 10**9)
    for _ in range(50):
        cache.write("k", b"a" * 10**5)
        cache.write("k", b"b" * 10**5)
    ended.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert cache.read("k") == b"b" * 10**5


@pytest.mark.parametrize(("name", "value"), [("RE2TAL_CACHE_GB", "much"), ("RE2TAL_CACHE", "/proc/x")])
def test_a_cache_that_cannot_be_is_named(
    server: Server, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name):
        CachedRange(Address(f"{server.address}/a.bin"), 0, 1, len(CONTENT), 1).read()


def batches(shards: ShardSet, *, training: bool, workers: int = 0) -> list[tuple[torch.Tensor, ...]]:
    config = replace(CLIPS, workers=workers)
    stream = stream_clips(shards, config, batch_size=2, training=training)
    return [(one.frames, one.valid, one.video_ids) for epoch in range(2) for one in stream.epoch(epoch)]


def same(some: list, others: list) -> bool:
    pairs = zip(some, others, strict=True)
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2] for a, b in pairs)


def test_a_folder_at_an_address_gives_the_batches_of_the_folder(server: Server, shards: ShardSet) -> None:
    server.add(shards.root.parent, "data")
    folder = subset_folder(Path(f"{server.address}/data"), "val")
    assert folder == Path(f"{server.address}/data/validation")
    there = open_shards(folder)
    assert (there.manifest_sha256, there.videos) == (shards.manifest_sha256, shards.videos)
    for training in (True, False):
        wanted = batches(shards, training=training)
        for workers in (2, 0):
            assert same(batches(there, training=training, workers=workers), wanted)
    asked = [path for path, range_ in server.gets() if range_ is not None and path.endswith(".tar")]
    assert len(asked) == 2 + len(LENGTHS)  # a byte of each tar at first, then each video once
    server.asked.clear()
    open_shards(folder)
    assert not [path for path, _ in server.gets() if path.endswith(("jsonl", "npy"))]


def test_a_video_that_does_not_come_is_left_out(server: Server, shards: ShardSet) -> None:
    server.add(shards.root, "data")
    there = open_shards(f"{server.address}/data")
    tar = bytearray(server.files["/data/shard-000001.tar"])
    place = there.videos[2].offset + 2_000
    server.files["/data/shard-000001.tar"] = bytes(tar[:place] + bytes([tar[place] ^ 1]) + tar[place + 1 :])
    stream = stream_clips(there, replace(CLIPS, allow_missing=True), batch_size=2, training=False)
    assert sum(int(one.valid.sum()) for one in stream.epoch(0)) > 0
    assert list(stream.failures) == ["v2"]
    assert "shard-000001.tar is damaged at byte 0: the checksum of v2.mp4" in stream.failures["v2"].reason
    server.files["/data/shard-000001.tar"] = bytes(tar)  # what was damaged is not kept
    again = stream_clips(there, CLIPS, batch_size=2, training=False)
    assert len(list(again.epoch(0))) == again.steps_per_epoch
    del server.files["/data/shard-000000.tar"]
    with pytest.raises(ValueError, match=r"/data/shard-000000\.tar has to be on this machine; copy the folder"):
        list(damage(there))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", b"<html>", r"/data/manifest\.json is no manifest of shards; check the address"),
        ("manifest.json", None, r"/data/manifest\.json: status 404; check the address"),
        ("index.jsonl", b"{}\n", r"/data/index\.jsonl is not the one that manifest\.json beside it was written for"),
        ("shard-000001.tar", b"x", r"/data/shard-000001\.tar has 1 bytes, the manifest says \d+: it was cut or"),
        ("shard-000001.tar", None, r"/data/shard-000001\.tar: status 404"),
    ],
)
def test_a_folder_that_does_not_fit_together_is_refused(
    server: Server, shards: ShardSet, name: str, content: bytes | None, message: str
) -> None:
    server.add(shards.root, "data")
    server.files[f"/data/{name}"] = content or b""
    if content is None:
        del server.files[f"/data/{name}"]
    with pytest.raises((ValueError, OSError), match=message):
        open_any(f"{server.address}/data")


def test_a_subset_that_is_not_there_is_named(server: Server) -> None:
    with pytest.raises(ValueError, match=r"/data has no manifest\.json in validation, val, valid, validate; check"):
        subset_folder(Path(f"{server.address}/data"), "validation")


def test_a_configuration_keeps_an_address(tmp_path: Path) -> None:
    config = RunConfig()
    there = replace(config, data=replace(config.data, shards=Path("https://h.org/data")))
    save_config(tmp_path / "config.json", there)
    assert '"https://h.org/data"' in (tmp_path / "config.json").read_text()
    assert load_config(tmp_path / "config.json") == there


def test_buckets_are_opened_by_bucket_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cloud: a file system in memory stands in for it."""
    memory = MemoryFileSystem()
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda scheme: MemoryFileSystem)
    monkeypatch.setattr(fsspec, "filesystem", lambda scheme, **options: {"s3": memory}[scheme])
    memory.pipe_file("bucket/folder/a b.bin", CONTENT)
    address = as_address("s3://bucket/folder/a b.bin")
    assert address is not None
    assert read_range(address, 7, 9, file_bytes=len(CONTENT)) == CONTENT[7:16]
    assert fetched(address) == CONTENT
    with pytest.raises(RemoteError, match=r"s3://bucket/none: status 404; check the address"):
        describe(Address("s3://bucket/none"))
    for name in ("b.mp4", "a c.MKV", "notes.txt", "more/d.webm"):
        memory.pipe_file(f"bucket/folder/{name}", b"x")
    found = find_videos([Path("s3://bucket/folder")])
    assert list(map(str, found.names)) == ["s3://bucket/folder/a c.MKV", "s3://bucket/folder/b.mp4"]
    assert [path.name for path in found.odd] == ["a b.bin", "notes.txt"]
    assert list(find_videos(["s3://bucket/folder/"], recursive=True).names.values()) == ["a c", "b", "d"]
    with pytest.raises(ValueError, match=r"s3://bucket/none holds no video file"):
        find_videos(["s3://bucket/none"])
    memory.rm("bucket", recursive=True)


def test_only_the_web_is_quoted_and_has_queries_and_fragments() -> None:
    names = {
        "s3://b/f/my%20clip+1.mp4": "my%20clip+1.mp4",
        "gs://b/x%2Fy.mp4": "x%2Fy.mp4",
        "s3://b/#1.mp4": "#1.mp4",
        "s3://b/take#2.mp4": "take#2.mp4",
        "hf://datasets/o/n/a%20b.mp4": "a%20b.mp4",
        "https://h.org/my%20clip+1.mp4?sig=1#t=3": "my clip+1.mp4",
    }
    for given, name in names.items():
        address = as_address(given)
        assert address is not None
        assert address.name == name
        assert address.is_web or address.url == str(address) == given
    # Of a listing, as a user cannot type it.
    assert (Address("s3://b/what?.mp4").name, str(Address("s3://b/what?.mp4"))) == ("what?.mp4", "s3://b/what?.mp4")
    with pytest.raises(ValueError) as refused:
        as_address("s3://b/a.mp4?X-Amz-Signature=hunter2")
    assert "hunter2" not in str(refused.value)


def test_folders_on_the_web_and_addresses_for_the_viewer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"https://h.org/a/ is a folder on the web, which cannot be listed; give the"):
        find_videos(["https://h.org/a/"])
    with pytest.raises(ValueError, match=r"--videos s3://b/a: the page shows files of this machine; copy it here"):
        open_viewer(Path("results.json"), ViewOptions(videos=Path("s3://b/a")))


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(scheme: str) -> None:
        raise ImportError(scheme)

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=r"gs://b/k: gs addresses need another library; pip install gcsfs"):
        describe(Address("gs://b/k"))
