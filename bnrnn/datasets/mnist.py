"""MNIST: 28 x 28 images of digits, 50,000 / 10,000 / 10,000."""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bnrnn.datasets.cache import Arrays, cached_arrays
from bnrnn.datasets.fetch import RemoteFile, fetch
from bnrnn.errors import DataError

_ADDRESSES = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_HASHES = {
    "train-images-idx3-ubyte.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "md5:d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "md5:9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "md5:ec29112dd5afa0611ce80d1b7f02629c",
}
_FORMAT_VERSION = 1
_VALID = 10_000


@dataclass(frozen=True)
class MNIST:
    """Images (n, 784) uint8, rows of pixels one after the other; labels (n,) int64.

    The validation set is the last 10,000 of the training file, as in the paper.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    valid_images: np.ndarray
    valid_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_mnist(data_dir: Path) -> MNIST:
    """From `data_dir/mnist`, fetched if it is not there.

    Raises:
        DataError: a file is missing and cannot be fetched, or is damaged.
    """
    files = [
        fetch(
            RemoteFile(name, tuple(address + name for address in _ADDRESSES), digest),
            data_dir / "mnist",
        )
        for name, digest in _HASHES.items()
    ]

    def parse() -> Arrays:
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return {name: read_idx(file) for name, file in zip(names, files, strict=True)}

    arrays = cached_arrays("mnist", files, _FORMAT_VERSION, parse)
    images = arrays["train_images"].reshape(-1, 784)
    labels = arrays["train_labels"].astype(np.int64)
    return MNIST(
        images[:-_VALID],
        labels[:-_VALID],
        images[-_VALID:],
        labels[-_VALID:],
        arrays["test_images"].reshape(-1, 784),
        arrays["test_labels"].astype(np.int64),
    )


def read_idx(path: Path) -> np.ndarray:
    """A gzipped idx file of unsigned bytes: two zeros, type 8, the number of dimensions, the sizes.

    Raises:
        DataError: it is no such file, or is cut short.
    """
    try:
        with gzip.open(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is cut short or not gzip ({error}): delete it and fetch it again"
        ) from error
    header = 4 + 4 * (content[3] if len(content) >= 4 else 0)
    if content[:3] != b"\0\0\x08" or len(content) < header:
        raise DataError(f"{path} is no idx file of bytes: delete it and fetch it again")
    shape = np.frombuffer(content[4:header], ">u4").astype(int)
    if len(content) - header != shape.prod():
        raise DataError(
            f"{path} has {len(content) - header} bytes of data, its header says "
            f"{shape.prod()}: delete it and fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
