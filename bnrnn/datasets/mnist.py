"""MNIST from the four official gzipped idx files."""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bnrnn.datasets.fetch import RemoteFile, fetch
from bnrnn.datasets.limits import gunzip
from bnrnn.errors import DataError

VALID_SIZE = 10_000
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
ADVICE = "delete it to fetch it again, or set data_dir"
# name, bytes, md5, shape
FILES = {
    "train_images": (
        "train-images-idx3-ubyte.gz", 9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        (60_000, 28, 28),
    ),
    "train_labels": (
        "train-labels-idx1-ubyte.gz", 28_881, "d53e105ee54ea40749a09fcbcd1e9432", (60_000,),
    ),
    "test_images": (
        "t10k-images-idx3-ubyte.gz", 1_648_877, "9fb629c4189551a2d022fa330f9573f3",
        (10_000, 28, 28),
    ),
    "test_labels": (
        "t10k-labels-idx1-ubyte.gz", 4_542, "ec29112dd5afa0611ce80d1b7f02629c", (10_000,),
    ),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class MNIST:
    """Images (N, 784) uint8 in row order, 0 (background) to 255 (ink); labels (N,) int64, 0 to 9.

    N is 50,000 / 10,000 / 10,000; valid is the last 10,000 of the official training set.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    valid_images: np.ndarray
    valid_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_mnist(data_dir: Path) -> MNIST:
    """Load MNIST from the files in `data_dir/mnist`; download missing files.

    Raises:
        DataError: a file is damaged or cannot be fetched.
    """
    arrays = {}
    for part, (name, size, md5, shape) in FILES.items():
        urls = tuple(mirror + name for mirror in MIRRORS)
        file = RemoteFile(name, urls, f"md5:{md5}", size)
        arrays[part] = read_idx(fetch(file, data_dir / "mnist"), shape)
    images = arrays["train_images"].reshape(-1, 784)
    labels = arrays["train_labels"].astype(np.int64)
    return MNIST(
        images[:-VALID_SIZE],
        labels[:-VALID_SIZE],
        images[-VALID_SIZE:],
        labels[-VALID_SIZE:],
        arrays["test_images"].reshape(-1, 784),
        arrays["test_labels"].astype(np.int64),
    )


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read the gzipped idx file of bytes at `path` as uint8 of `shape`.

    Raises:
        DataError: the file cannot be read or decompressed, or is not an idx file of that shape.
    """
    # Two zero bytes, the type (8: unsigned byte), the number of axes, the axes' big-endian sizes.
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    size = math.prod(shape)
    content = gunzip(path, len(header) + size, ADVICE)
    found = len(content) - len(header)
    if content[:4] != header[:4]:
        what = f"has magic number {content[:4].hex()}, not {header[:4].hex()}"
    elif content[: len(header)] != header:
        what = f"does not have the shape {shape}"
    elif found != size:
        what = f"holds {'at least ' if found > size else ''}{found} bytes of data, not {size}"
    else:
        # Copy, because an array over bytes is read-only.
        return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape).copy()
    raise DataError(f"{path} {what}; {ADVICE}")
