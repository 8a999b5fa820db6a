"""Opening and verifying shard folders: each way in which one can be wrong, and what is said about it."""

import hashlib
import json
import re
import shutil
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from data.files import encoding
from data.numbered import encode_numbered

from re2tal.data.contract.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    IndexedVideo,
    Manifest,
    ShardFile,
    SourceVideo,
    StoredVideo,
    Totals,
    to_json,
)
from re2tal.data.contract.shards import Pair, open_shards, write_tar
from re2tal.data.contract.verify import damage
from re2tal.structures import Action, VideoRecord

BLOCK = 512


def stored(video_id: str) -> StoredVideo:
    source = SourceVideo(f"{video_id}.mp4", "0" * 64, "h264", 60, 2.0)
    return StoredVideo(num_frames=30, fps=15.0, width=64, height=48, source=source)


def recorded(video_id: str) -> VideoRecord:
    return VideoRecord(video_id, "training", 2.0, (Action(0.5, 1.5, "run"),))


def described(video_id: str) -> bytes:
    """The member of a video; in the first shard with a record of old labels, as earlier builds wrote it."""
    old = {"record": {"video_id": video_id, "subset": "test", "actions": "of old"}} if video_id[0] == "0" else {}
    return json.dumps({**json.loads(to_json(stored(video_id))), **old}, separators=(",", ":")).encode()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Two shards of three videos each."""
    root = tmp_path_factory.mktemp("shards") / "training"
    root.mkdir()
    videos, files = [], []
    for shard in ("shard-000000.tar", "shard-000001.tar"):
        names = [f"{shard[11]}{letter}" for letter in "abc"]
        mp4s = [encode_numbered(30, fps=15) + bytes([0, 0, 0, 10]) + b"free" + name.encode() for name in names]
        pairs = [Pair(n, described(n), mp4) for n, mp4 in zip(names, mp4s, strict=True)]
        places = write_tar(root / shard, pairs)
        for name, mp4, (offset, num_bytes) in zip(names, mp4s, places, strict=True):
            record = recorded(name)
            videos.append(IndexedVideo(record, shard, offset, num_bytes, 30, 15.0, 64, 48, zlib.crc32(mp4)))
        tar = (root / shard).read_bytes()
        files.append(ShardFile(shard, len(tar), hashlib.sha256(tar).hexdigest(), 3))
    index = "".join(to_json(video) + "\n" for video in videos).encode()
    (root / INDEX_NAME).write_bytes(index)
    manifest = Manifest(
        format="re2tal-shards",
        version=1,
        dataset="own",
        subset="training",
        classes=("jump", "run"),
        encoding=encoding(fps=15),
        seed=0,
        tools={"av": "18"},
        totals=Totals(6, 180, 12.0, sum(file.num_bytes for file in files)),
        rejected=(),
        index_sha256=hashlib.sha256(index).hexdigest(),
        shards=tuple(files),
    )
    (root / MANIFEST_NAME).write_text(to_json(manifest))
    return root


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "SHARDS" / "training"))


def edit_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    content = json.loads((folder / MANIFEST_NAME).read_text())
    change(content)
    (folder / MANIFEST_NAME).write_text(json.dumps(content))


def edit_index(folder: Path, change: Callable[[list[dict]], None]) -> None:
    """Change the index, and the manifest's hash of it: what remains is what the index says."""
    lines = [json.loads(line) for line in (folder / INDEX_NAME).read_text().splitlines()]
    change(lines)
    (folder / INDEX_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    sha256 = hashlib.sha256((folder / INDEX_NAME).read_bytes()).hexdigest()
    edit_manifest(folder, lambda manifest: manifest.update(index_sha256=sha256))


def test_a_sound_folder_opens_with_its_videos_in_order_and_the_labels_of_its_index(folder):
    shards = open_shards(folder)
    assert [video.record.video_id for video in shards.videos] == ["0a", "0b", "0c", "1a", "1b", "1c"]
    assert shards.by_id["1b"].record == recorded("1b")
    assert shards.by_id["1b"].video_seconds == 2.0
    assert (shards.subset, shards.classes) == ("training", ("jump", "run"))
    assert shards.path(shards.videos[0].shard) == folder / "shard-000000.tar"
    assert shards.manifest_sha256 == hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
    assert list(damage(shards)) == []


def test_each_place_in_the_index_is_a_tar_of_its_own(folder):
    for video in open_shards(folder).videos:
        stretch = (folder / video.shard).read_bytes()[video.offset : video.offset + video.num_bytes]
        video_id = video.record.video_id
        with tarfile.open(fileobj=BytesIO(stretch)) as tar:
            assert tar.getnames() == [f"{video_id}.json", f"{video_id}.mp4"]


def test_members_are_plain_read_only_files_without_time_or_owner(folder):
    with tarfile.open(folder / "shard-000000.tar") as tar:
        assert {(m.mtime, m.mode, m.type, m.uid) for m in tar.getmembers()} == {(0, 0o444, tarfile.REGTYPE, 0)}


def test_a_video_in_a_file_is_not_held_in_memory_and_gives_the_same_tar(tmp_path):
    content = bytes(range(256)) * 40_000  # ten megabytes
    (tmp_path / "made.mp4").write_bytes(content)
    places = [write_tar(tmp_path / "bytes.tar", [Pair("a.b", b"{}", content)])]
    tracemalloc.start()
    places.append(write_tar(tmp_path / "file.tar", [Pair("a.b", b"{}", tmp_path / "made.mp4")]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert (tmp_path / "bytes.tar").read_bytes() == (tmp_path / "file.tar").read_bytes()
    assert places[0] == places[1]


def test_a_tar_whose_making_fails_leaves_nothing_behind(tmp_path):
    def pairs():
        yield Pair("a", b"{}", b"x" * 1000)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_tar(tmp_path / "shard-000000.tar", pairs())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_manifest_or_index_says_how_to_build_it(folder):
    command = "re2tal shards build --videos DIR --annotations FILE --out .*SHARDS --subsets training"
    (folder / INDEX_NAME).unlink()
    with pytest.raises(ValueError, match=rf"training has no index\.jsonl.*{command}"):
        open_shards(folder)
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(ValueError, match=rf"has no manifest\.json and no index\.jsonl.*{command}"):
        open_shards(folder)
    with pytest.raises(ValueError, match=r"nowhere is not a folder.*re2tal shards build"):
        open_shards(folder / "nowhere")


def test_the_folder_above_names_the_ones_to_give(folder):
    with pytest.raises(ValueError, match=r"one shard folder per subset; give one of: \['.*SHARDS/training'\]"):
        open_shards(folder.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), "is not a manifest of re2tal-shards"),
        (
            lambda m: m.update(version=2),
            "has version 2, this program reads 1; make the folder again with",
        ),
        (lambda m: m["totals"].update(frames=181), "holds 6 videos of 180 samples, .* says 6 of 181"),
        (lambda m: m["totals"].update(videos=7), "holds 6 videos of 180 samples, .* says 7 of 180"),
        (lambda m: m["shards"][0].update(name="../../etc/passwd"), r"shards\.0\.name is '\.\./\.\./etc/passwd'"),
        (lambda m: m["shards"][0].update(name="pipe:touch x"), r"shards\.0\.name is 'pipe:touch x'"),
        (lambda m: m["shards"][0].update(name="/shard-000000.tar"), r"shards\.0\.name"),
        (lambda m: m.update(subset="../training"), r"subset is '\.\./training'"),
        (lambda m: m["shards"][0].update(num_bytes="12"), r"shards\.0\.num_bytes is '12'"),
        (lambda m: m.pop("classes"), "classes is"),
        (lambda m: m["encoding"].update(sampling={}), r"encoding\.sampling"),
        (lambda m: m["shards"].pop(), "lists 6 videos in 2 shards"),
        (lambda m: m["shards"][0].update(videos=4), "lists 6 videos in 2 shards"),
        (lambda m: m.update(classes=["jump"]), r"'0a' has labels \['run'\] that are not among the classes"),
        (lambda m: m.update(index_sha256="0" * 64), "is not the one that manifest.json was written for"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(folder, change, message):
    edit_manifest(folder, change)
    with pytest.raises(ValueError, match=message):
        open_shards(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v[0].update(shard="../x.tar"), r"index\.jsonl line 1: shard is '\.\./x\.tar'"),
        (lambda v: v[1].update(offset=-1), r"line 2: offset is '-1'"),
        (lambda v: v[1].update(fps=0), r"line 2: fps is '0'"),
        (lambda v: v[1].update(fps=float("inf")), "'0b' has a time that is not finite"),
        (lambda v: v[1].update(num_frames=2.5), "num_frames"),
        (lambda v: v[1].pop("crc32"), "crc32"),
        (lambda v: v[1].update(offset=10**9), "'0b' lies past the end of shard-000000.tar"),
        (lambda v: v[1]["record"].update(video_id="0a"), "'0a' is listed twice"),
        (lambda v: v[1]["record"].update(video_id="a/b"), "'a/b' is not an id"),
        (lambda v: v[1]["record"].update(subset="test"), "'0b' belongs to subset 'test', not to 'training'"),
        (lambda v: v[1]["record"].update(duration_seconds=float("nan")), "not finite"),
        (lambda v: v.pop(), "lists 5 videos in 2 shards"),
        (lambda v: v.clear(), "lists 0 videos"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(folder, change, message):
    edit_index(folder, change)
    with pytest.raises(ValueError, match=message):
        open_shards(folder)


def test_a_manifest_that_is_not_json_is_refused(folder):
    (folder / MANIFEST_NAME).write_text('{"format": ')
    with pytest.raises(ValueError, match=r"manifest\.json is not usable JSON"):
        open_shards(folder)


def test_a_missing_or_cut_tar_is_named(folder):
    tar = folder / "shard-000001.tar"
    video = open_shards(folder).by_id["1b"]
    tar.write_bytes(tar.read_bytes()[: video.offset])  # between two videos: the tar itself looks whole
    with pytest.raises(ValueError, match=r"shard-000001\.tar has \d+ bytes, manifest\.json says \d+: it was cut"):
        open_shards(folder)
    tar.unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.tar is missing.*re2tal shards build"):
        open_shards(folder)


def put(folder: Path, offset: int, content: bytes) -> None:
    with (folder / "shard-000000.tar").open("r+b") as file:
        file.seek(offset)
        file.write(content)


def member(name: str, *, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> bytes:
    header = tarfile.TarInfo(name)
    header.type, header.size, header.linkname = kind, size, link
    return header.tobuf(tarfile.GNU_FORMAT)


DAMAGES = {
    "a flipped bit in the pictures": (lambda json_, mp4: (mp4 + BLOCK + 77, b"\x00\x01\x02"), "0b: crc32 of the mp4"),
    "a zeroed header": (lambda json_, mp4: (json_, bytes(BLOCK)), "0b: no readable tar header"),
    "a damaged header": (lambda json_, mp4: (mp4 + 150, b"77"), "0b: no readable tar header for 0b.mp4"),
    "another member": (lambda json_, mp4: (json_, member("x.json", size=9)), "0b: member 'x.json'"),
    "the same key again": (lambda json_, mp4: (json_, member("0a.json", size=9)), "0b: member '0a.json'"),
    "a pickle": (lambda json_, mp4: (mp4, member("0b.pyd", size=9)), "0b: member '0b.pyd'"),
    "a path out of the folder": (lambda json_, mp4: (mp4, member("../0b.mp4", size=9)), r"0b: member '\.\./0b\.mp4'"),
    "a symbolic link": (
        lambda json_, mp4: (mp4, member("0b.mp4", kind=tarfile.SYMTYPE, link="/etc/passwd")),
        "0b: member '0b.mp4' of type b'2'",
    ),
    "a device": (lambda json_, mp4: (mp4, member("0b.mp4", kind=tarfile.CHRTYPE)), "of type b'3'"),
    "a sparse file": (lambda json_, mp4: (mp4, member("0b.mp4", kind=tarfile.GNUTYPE_SPARSE, size=9)), "of type b'S'"),
    "a terabyte": (lambda json_, mp4: (mp4, member("0b.mp4", size=2**40)), "claims 1099511627776 bytes"),
    "a shorter member": (lambda json_, mp4: (mp4, member("0b.mp4", size=9)), "bytes lie between this video and"),
    "another length": (lambda json_, mp4: (json_ + BLOCK, b'{"num_frames":31'), "0b: num_frames is 31 in its json"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_that_keeps_the_size_is_found_and_placed(folder, kind):
    shards = open_shards(folder)
    place, message = DAMAGES[kind]
    start = shards.by_id["0b"].offset
    description = len(described("0b"))
    put(folder, *place(start, start + BLOCK + -(-description // BLOCK) * BLOCK))
    problems = list(damage(open_shards(folder)))
    assert "shard-000000.tar: sha256 is" in problems[0]
    assert len(problems) == 2, problems
    assert re.search(message, problems[1])


def test_padding_that_changed_is_found_by_the_hash_alone(folder):
    put(folder, (folder / "shard-000000.tar").stat().st_size - 5, b"x")
    (problem,) = damage(open_shards(folder))
    assert "shard-000000.tar: sha256 is" in problem


def test_a_folder_that_was_built_before_damage_was_counted_opens(folder):
    edit_index(folder, lambda videos: [video.pop("damaged_share") for video in videos])
    edit_manifest(folder, lambda manifest: manifest.pop("damaged"))
    shards = open_shards(folder)
    assert {video.damaged_share for video in shards.videos} == {0.0}
    assert shards.manifest.damaged == ()
