"""Files that are there and right, or are fetched and then right."""

import hashlib
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pooch
import requests

from bnrnn.errors import DataError

# Pooch reports every download at INFO; the progress bar says the same.
pooch.get_logger().setLevel(logging.WARNING)


@dataclass(frozen=True)
class RemoteFile:
    """A file's name, its addresses in the order to try, and its hash ("md5:...", "sha256:...")."""

    name: str
    urls: tuple[str, ...]
    hash: str


def fetch(file: RemoteFile, folder: Path) -> Path:
    """`folder/file.name`, verified; downloaded if it is not there.

    Raises:
        DataError: its hash is wrong, no address serves it, or the folder cannot be written to.
    """
    path = folder / file.name
    if path.exists():
        verify(path, file.hash)
        return path
    failures = []
    for url in file.urls:
        try:
            downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=30)
            folder.mkdir(parents=True, exist_ok=True)
            pooch.retrieve(
                url,
                file.hash,
                file.name,
                folder,
                downloader=downloader,  # type: ignore[arg-type]
            )
            return path
        except (requests.RequestException, ValueError) as error:
            # ValueError is pooch's word for a wrong hash; it keeps nothing of such a file.
            reason = "wrong hash" if isinstance(error, ValueError) else _short(error)
            failures.append(f"{urlsplit(url).netloc}: {reason}")
        except OSError as error:
            raise DataError(
                f"cannot write to {folder}: {error.strerror}; set data_dir to another folder"
            ) from error
    raise DataError(
        f"{path} is not there and could not be downloaded ({'; '.join(failures)}): put it there "
        "by hand, or set data_dir to where it lies"
    )


def verify(path: Path, expected: str) -> None:
    """
    Raises:
        DataError: the file's hash is not `expected`.
    """
    kind, _, digest = expected.partition(":")
    try:
        with open(path, "rb") as content:
            found = hashlib.file_digest(content, kind).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if found != digest:
        raise DataError(
            f"{path} is not the file it should be: its {kind} is {found[:12]}…, not "
            f"{digest[:12]}…; delete it to fetch it again, or set data_dir to another folder"
        )


def _short(error: Exception) -> str:
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"HTTP status {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return type(error).__name__


__all__ = ["RemoteFile", "fetch", "verify"]
