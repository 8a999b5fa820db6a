"""Files of features that are not what they seem are refused by name, and nothing in them runs."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from re2tal.data.building import feature_files
from re2tal.data.building.feature_files import load_array
from re2tal.data.building.pack_features import find_layout
from re2tal.data.contract.shards import open_any
from re2tal.runs.feature_packing import Pack, pack

STEPS = np.arange(12, dtype=np.float32).reshape(4, 3) / 8


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_is_unpickled(tmp_path):
    trace = tmp_path / "trace"
    np.save(tmp_path / "a.npy", np.array([Bomb(trace)], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=np.array([Bomb(trace)], dtype=object))
    torch.save({"x": Bomb(trace)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Bomb(trace)))
    for name in ("a.npy", "a.npz", "a.pt", "b.pt"):
        with pytest.raises(ValueError, match=rf"^{name} is no sound \.\w+ file of numbers"):
            load_array(tmp_path / name)
    assert not trace.exists()


def test_small_files_that_claim_gigabytes_are_refused(tmp_path):
    torch.save(torch.zeros(1, 1).expand(1 << 20, 1 << 12).detach(), tmp_path / "a.pt")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 22, 1 << 10)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header.getvalue())
    raw = (tmp_path / "a.npz").read_bytes()
    at = raw.index(b"PK\x01\x02")  # the directory's entry: its uncompressed size is 24 bytes in
    raw = raw[: at + 24] + (0xFFFFFFFE).to_bytes(4, "little") + raw[at + 28 :]
    (tmp_path / "b.npz").write_bytes(raw)
    for name, message in (
        ("a.pt", "claims 17179869184 bytes"),
        ("a.npz", "no sound .npz file"),
        ("b.npz", "no sound .npz file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_array(tmp_path / name)


def test_what_unfolds_to_too_much_is_refused_before_or_as_it_adds_up(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "MAX_BYTES", 1 << 20)
    torch.save(torch.zeros(1 << 19), tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "a.pt", "w", 8) as packed:
        for one in plain.infolist():
            packed.writestr(one.filename, plain.read(one))
    assert (tmp_path / "a.pt").stat().st_size < 1 << 13
    loaded = []
    monkeypatch.setattr(torch, "load", lambda *args, **options: loaded.append(args))
    np.savez_compressed(tmp_path / "a.npz", **{f"x{number}": np.zeros((1 << 8, 3 << 7)) for number in range(3)})
    for name, num_bytes in (("a.pt", 1 << 21), ("a.npz", 3 << 19)):
        with pytest.raises(ValueError, match=rf"{name} claims {num_bytes} bytes of numbers"):
            load_array(tmp_path / name)
    assert not loaded


def test_of_several_arrays_one_that_is_too_large_is_no_reason_to_say_that_there_is_none(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    monkeypatch.setattr(feature_files, "MAX_BYTES", 1 << 12)
    arrays = {"all": np.ones((64, 32), dtype=np.float32), "rgb": STEPS, "label": np.array(3)}
    np.savez(tmp_path / "a.npz", **arrays)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.update(arrays)
    for name in ("a.npz", "a.h5"):
        with pytest.raises(
            ValueError, match=rf"{name} claims 8\d\d\d bytes .*; where it holds several arrays, .* --key"
        ):
            load_array(tmp_path / name)
        assert (load_array(tmp_path / name, key="rgb") == STEPS).all()


def test_an_array_that_others_follow_is_not_taken_for_all(tmp_path):
    with (tmp_path / "a.npy").open("wb") as file:
        for _ in range(2):
            np.save(file, np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"a\.npy goes on behind its array of shape \(3, 4\)"):
        load_array(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0.5,1.5\n2.5,3.5\n", [[0.5, 1.5], [2.5, 3.5]]),
        ("\ufeffrgb0;rgb1\r\n0.5;1.5\r\n2.5;3.5\r\n", [[0.5, 1.5], [2.5, 3.5]]),
        ("0,1\n0.5,1.5\n", [[0.5, 1.5]]),
        ("0.5 1.5\n2.5 3.5\n", [[0.5, 1.5], [2.5, 3.5]]),
        ('"a"\t"b"\n"0.5"\t"1.5"\n', [[0.5, 1.5]]),
        (",a,b\n0,0.5,1.5\n", "a.csv begins with a column without a name, as row numbers are written"),
        ("0,0.5\n1,1.5\n2,2.5\n", "a.csv begins with a column that counts rows"),
        ("1,0.5\n2,0.5\n3,2.5\n", "a.csv begins with a column that counts rows"),
        ("frame,rgb\n8,0.5\n24,0.5\n41,2.5\n56,2.5\n", "a.csv begins with a column 'frame', which is no feature"),
        ("0.53,3\n1.07,2\n1.6,5\n2.13,7\n", "a.csv begins with a column that counts rows, frames or seconds"),
        ("1,2,3\n0.5,0.2,1.5\n", "a.csv begins with a row that counts columns"),
        ("0,5;1,5\n", "a.csv has no row of numbers with a point"),
        ("0.5,1.5\n2.5\n", "a.csv is no sound .csv file of numbers"),
        ("0,5;1,5\n2,5;3,5\n", "a.csv is no sound .csv file of numbers"),
    ],
)
def test_tables_are_read_with_or_without_a_header_and_never_with_row_numbers(tmp_path, text, wanted):
    path = tmp_path / "a.csv"
    path.write_text(text, newline="")
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            load_array(path)
    else:
        assert load_array(path).tolist() == wanted


def test_one_of_several_arrays_is_taken_by_its_name(tmp_path):
    np.savez(tmp_path / "a.npz", rgb=STEPS, flow=-STEPS)
    with pytest.raises(ValueError, match=r"2 arrays that could be features \('rgb', 'flow'\): name one with --key"):
        load_array(tmp_path / "a.npz")
    assert (load_array(tmp_path / "a.npz", key="flow") == -STEPS).all()
    with pytest.raises(ValueError, match=r"has no array 'x'; it has 'rgb', 'flow'"):
        load_array(tmp_path / "a.npz", key="x")
    np.savez(tmp_path / "b.npz", label=np.array(3))
    with pytest.raises(ValueError, match=r"holds no array of floats with two axes; it has 'label'"):
        load_array(tmp_path / "b.npz")


def test_hdf5_never_leads_to_other_files(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = STEPS
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = h5py.ExternalLink("other.h5", "x")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        layout = h5py.VirtualLayout(shape=STEPS.shape, dtype="f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", shape=STEPS.shape)
        file.create_virtual_dataset("x", layout)
    with pytest.raises(ValueError, match=r"a\.h5 holds no array"):
        load_array(tmp_path / "a.h5")
    with pytest.raises(ValueError, match=r"b\.h5 keeps /x in other files"):
        load_array(tmp_path / "b.h5")
    assert (load_array(tmp_path / "other.h5") == STEPS).all()


@pytest.mark.parametrize(
    ("shapes", "wanted"),
    [
        ([(40, 6), (33, 6), (51, 6)], "tc"),
        ([(6, 40), (6, 33), (6, 51)], "ct"),
        ([(40, 6), (33, 6), (51, 6), (6, 40)], "tc"),
        ([(40, 6), (33, 7), (51, 8)], "no axis has the same length in most"),
        ([(40, 6), (40, 6)], "2 files, of shape 40x6, do not tell which axis is time"),
    ],
)
def test_the_axis_that_most_files_share_is_that_of_channels(shapes, wanted):
    named = {str(number): shape for number, shape in enumerate(shapes)}
    if len(wanted) == 2:
        assert find_layout(named) == wanted
    else:
        with pytest.raises(ValueError, match=wanted):
            find_layout(named)


def write(path: Path, values: np.ndarray) -> None:
    """Features in the format that the name ends in."""
    match path.suffix:
        case ".npy":
            np.save(path, values)
        case ".npz":
            np.savez(path, values)
        case ".pt":
            torch.save(torch.from_numpy(values), path)
        case ".h5":
            with pytest.importorskip("h5py").File(path, "w") as file:
                file["x"] = values
        case ".csv":
            np.savetxt(path, values.reshape(len(values), -1), delimiter=",")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".h5", ".csv"])
def test_one_odd_item_of_any_format_is_left_out_and_named(tmp_path, suffix):
    rng = np.random.default_rng(0)
    good = rng.standard_normal((21, 8)).astype(np.float32)
    (tmp_path / "f").mkdir()
    odd = {
        "empty": b"",
        "noise": rng.integers(0, 256, 500, dtype=np.uint8).tobytes(),
        "text": b"no numbers\nat all\n",
        "flat": good.ravel(),
        "deep": good.reshape(3, 7, 8),
        "wide": np.ones((21, 9), np.float32),
        "nan": np.where(good == good[2, 3], np.float32("nan"), good),
        "infinite": np.where(good == good[2, 3], np.float32("inf"), good),
        "short": good[:3],
    }
    items = {**odd, "cut": None, "folder": None, **{f"good{number}": good[: 19 + number % 3] for number in range(30)}}
    database = {}
    for name, content in items.items():
        path = tmp_path / "f" / f"{name}{suffix}"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            write(path, content)
        seconds = (len(content) if name.startswith("good") else 21) * 4 / 25
        action = {"segment": [0.2, 1.0], "label": "x"}
        database[name] = {"subset": "training", "duration": seconds, "annotations": [action]}
    write(tmp_path / "f" / f"cut{suffix}", good)
    cut = tmp_path / "f" / f"cut{suffix}"
    cut.write_bytes(cut.read_bytes()[:400])
    (tmp_path / "f" / f"folder{suffix}").mkdir()
    (tmp_path / "a.json").write_text(json.dumps({"database": database}))
    options = Pack(
        features=tmp_path / "f",
        annotations=tmp_path / "a.json",
        out=tmp_path / "out",
        stride_frames=4,
        window_frames=4,
        fps=25.0,
        max_rejected=1.0,
    )
    assert pack(options) == 0
    manifest = open_any(tmp_path / "out" / "training").manifest
    reasons = {one.video_id: one.reason for one in manifest.rejected}
    assert reasons.keys() == {*odd, "cut", "folder"}
    assert manifest.totals.videos == 30
    assert all(reasons.values())
    assert not any("unsafe" in reason for reason in reasons.values())
