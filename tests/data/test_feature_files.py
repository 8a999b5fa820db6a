"""Files of features that are not what they seem are refused by name, and nothing in them runs."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch

from re2tal.data.building.feature_files import load_array
from re2tal.data.building.pack_features import find_layout

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
        ("frame,rgb\n8,0.5\n24,0.5\n40,2.5\n56,2.5\n", "a.csv begins with a column that counts rows"),
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
