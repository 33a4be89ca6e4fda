"""Files from the network, verified by their hash; a file that is already there is never touched."""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pooch

from bnrnn.errors import DataError

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 30  # without an answer, not for the whole file


@dataclass(frozen=True)
class RemoteFile:
    """A file of known content and the addresses that serve it.

    hash: as pooch writes it, "md5:...", "sha1:..." or "sha256:...".
    """

    name: str
    urls: tuple[str, ...]
    hash: str


def fetch(file: RemoteFile, folder: Path, *others: RemoteFile) -> Path:
    """The path of `file` in `folder`, downloaded if it is not there.

    others: files that serve as well (the same content, packed otherwise), tried after `file`.

    Raises:
        DataError: the file there has another hash, no address serves it, or `folder` cannot be
            written.
    """
    folder, files = expand(folder), (file, *others)
    for candidate in files:
        path = folder / candidate.name
        if os.path.exists(path):
            _verify(path, candidate.hash)
            return path
    tried = []
    for candidate in files:
        for url in candidate.urls:
            failure = _download(url, candidate, folder)
            if failure is None:
                return folder / candidate.name
            log.info("%s: %s", url, failure)
            tried.append(f"{url} ({failure})")
    paths = " or ".join(str(folder / candidate.name) for candidate in files)
    raise DataError(
        f"cannot fetch {file.name}; tried {', '.join(tried)}; put it at {paths} by hand, or set "
        f"data_dir to a folder that has {folder.name}/{file.name}"
    )


def expand(path: Path) -> Path:
    """`path` with a leading ~ replaced: shells leave it alone in `data_dir=~/data`."""
    return Path(os.path.expanduser(path))


def _verify(path: Path, known: str) -> None:
    algorithm, expected = known.split(":")
    try:
        found = pooch.file_hash(str(path), alg=algorithm)
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; make it readable or set data_dir"
        ) from error
    if found != expected:
        raise DataError(
            f"{path} is not the file it should be: {algorithm} {found[:8]}… instead of "
            f"{expected[:8]}…; delete it to have it fetched afresh, or set data_dir"
        )


def _download(url: str, file: RemoteFile, folder: Path) -> str | None:
    """Why it failed, in a few words; None if the verified file is in place."""
    # Slow to import, and needed by downloads only.
    from requests.exceptions import HTTPError, RequestException

    pooch.get_logger().setLevel(logging.WARNING)  # it would write to stderr by itself
    downloader = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(),
        timeout=TIMEOUT_SECONDS,
        # A server that packs the .gz once more would have it unpacked on arrival.
        headers={"Accept-Encoding": "identity"},
    )
    log.info("fetching %s", url)
    try:
        pooch.retrieve(
            url,
            file.hash,
            file.name,
            folder,
            # pooch's type for downloaders does not fit its own ones.
            downloader=downloader,  # pyright: ignore[reportArgumentType]
        )
    except HTTPError as error:
        return str(error).split(" for url")[0]
    except RequestException as error:
        return type(error).__name__
    except ValueError:
        return "wrong hash"
    except OSError as error:
        # pooch raises this one anew, with a text of its own that is too long for one line.
        denied = isinstance(error, PermissionError)
        reason = "Permission denied" if denied else error.strerror or error
        raise DataError(
            f"cannot write {folder / file.name}: {reason}; set data_dir to a folder that can be "
            "written"
        ) from error
    return None
