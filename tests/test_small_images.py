"""Small images from the files that datasets come in."""

import gzip

import numpy as np
import pytest
import torch
from small_images import load_fashion_mnist, read_idx


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()) if path.suffix == ".gz" else header + array.tobytes())


@pytest.fixture
def folder(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", pixels)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([9, 0, 3], dtype=np.uint8))
    return tmp_path


def test_images_and_labels_are_read_compressed_or_not(folder):
    images, labels = load_fashion_mnist(folder)
    assert images.shape == (3, 1, 28, 28)
    assert labels.tolist() == [9, 0, 3]
    pixels = read_idx(folder / "train-images-idx3-ubyte")
    assert torch.equal(((images[:, 0] + 1) * 127.5).round().byte(), torch.from_numpy(pixels))


def test_sixteen_pixels_are_averages_within_a_black_frame(folder):
    large, small = load_fashion_mnist(folder)[0], load_fashion_mnist(folder, size=16)[0]
    assert small.shape == (3, 1, 16, 16)
    assert torch.allclose(small[:, 0, 1, 1], large[:, 0, :2, :2].mean((1, 2)), atol=1e-6)
    assert (small[:, 0, 0] == -1).all()


def test_missing_files_are_an_error_that_says_where_to_get_them(tmp_path):
    with pytest.raises(ValueError, match="dataset-fashion-mnist.*torchvision.datasets.FashionMNIST"):
        load_fashion_mnist(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0\0\x08", b"\0\0\x0d\x01\0\0\0\x01\0", b"\0\0\x08\x01\0\0\0\x05\0"])
def test_files_of_another_kind_are_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="no IDX file"):
        read_idx(tmp_path / "file")


def test_a_damaged_archive_is_refused(tmp_path):
    (tmp_path / "file.gz").write_bytes(gzip.compress(b"\0" * 1000)[:-10])
    with pytest.raises(ValueError, match="cannot be read"):
        read_idx(tmp_path / "file")
