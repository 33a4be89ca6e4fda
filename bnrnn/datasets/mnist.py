"""MNIST from the four official gzipped idx files."""

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bnrnn.datasets.fetch import RemoteFile, fetch
from bnrnn.errors import DataError

VALID_SIZE = 10_000
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
TRAIN, TEST = (60_000,), (10_000,)
# name, md5, shape
FILES = {
    "train_images": (
        "train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873", (*TRAIN, 28, 28),
    ),
    "train_labels": ("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432", TRAIN),
    "test_images": (
        "t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3", (*TEST, 28, 28),
    ),
    "test_labels": ("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c", TEST),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class MNIST:
    """Images (N, 784) uint8, row by row, 0 background to 255 ink; labels (N,) int64, 0 to 9.

    N is 50,000 / 10,000 / 10,000; valid is the end of the official training set.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    valid_images: np.ndarray
    valid_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_mnist(data_dir: Path) -> MNIST:
    """MNIST from the files in `data_dir/mnist`, downloaded if they are not there.

    Raises:
        DataError: a file is damaged or cannot be fetched.
    """
    arrays = {}
    for part, (name, md5, shape) in FILES.items():
        file = RemoteFile(name, tuple(mirror + name for mirror in MIRRORS), f"md5:{md5}")
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
    """The gzipped idx file of bytes at `path`, as uint8 of `shape`.

    Raises:
        DataError: it cannot be read or unpacked, or is not an idx file of that shape.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise _unusable(path, f"cannot be read or unpacked ({error})") from error
    # Two zero bytes, the type (8: unsigned byte), the number of axes, then their big-endian sizes.
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    if content[:4] != header[:4]:
        raise _unusable(path, f"has magic number {content[:4].hex()}, not {header[:4].hex()}")
    if content[: len(header)] != header:
        raise _unusable(path, f"does not have the shape {shape}")
    if len(content) != len(header) + math.prod(shape):
        raise _unusable(
            path, f"holds {len(content) - len(header)} bytes of data, not {math.prod(shape)}"
        )
    # A copy, because an array over bytes is read-only.
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape).copy()


def _unusable(path: Path, what: str) -> DataError:
    return DataError(f"{path} {what}; delete it to have it fetched afresh, or set data_dir")
