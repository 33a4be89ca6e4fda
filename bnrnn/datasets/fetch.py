"""Download files and verify their hashes. An existing file is never changed."""

import contextlib
import hashlib
import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pooch

from bnrnn import progress
from bnrnn.datasets.limits import reading
from bnrnn.datasets.staging import check_may_write, clean, publish, staging
from bnrnn.errors import DataError, printable

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 30  # without a response; not for the whole download
CHUNK = 1 << 16  # bytes received at a time


@dataclass(frozen=True)
class RemoteFile:
    """A file of known content and the addresses that serve it.

    hash: in pooch's notation: "md5:...", "sha1:..." or "sha256:...".
    size: in bytes; a larger file is not read, and its download stops there.
    """

    name: str
    urls: tuple[str, ...]
    hash: str
    size: int = 1 << 30


def fetch(file: RemoteFile, folder: Path, *others: RemoteFile) -> Path:
    """Return the path of `file` in `folder`; download it if it is missing.

    others: alternatives with the same content in another compression, tried after `file`.

    Raises:
        DataError: the existing file has another hash, no address serves it, or `folder` is not
            writable or only read, see `check_may_write`.
    """
    folder, files = expand(folder), (file, *others)
    for candidate in files:
        clean(folder, candidate.name)
    for candidate in files:
        path = folder / candidate.name
        if os.path.lexists(path):
            _verify(path, candidate)
            return path
    check_may_write(folder / file.name)
    tried = []
    for candidate in files:
        for url in candidate.urls:
            failure = _download(url, candidate, folder)
            if failure is None:
                return folder / candidate.name
            log.info("%s: %s", url, printable(failure))
            tried.append(f"{url} ({failure})")
    paths = " or ".join(str(folder / candidate.name) for candidate in files)
    raise DataError(
        f"cannot fetch {file.name}; tried {', '.join(tried)}; put it at {paths} by hand, or set "
        f"data_dir to a folder that has {folder.name}/{file.name}"
    )


def expand(path: Path) -> Path:
    """Return `path` with a leading ~ expanded; shells do not expand it in `data_dir=~/data`.

    Raises:
        DataError: there is no home folder, or `path` is not a valid path.
    """
    expanded = Path(os.path.expanduser(path))
    try:
        os.stat(expanded)
    except ValueError as error:  # a NUL or a lone surrogate
        raise DataError(f"{path} cannot be a path ({error}); set another one") from error
    except OSError:
        pass  # does not exist yet
    if expanded.parts[:1] == ("~",):
        raise DataError(
            f"cannot find the home folder for {path}: set HOME, or a path without ~ (data_dir, "
            "task.path, BNRNN_CACHE_DIR)"
        )
    return expanded


def _verify(path: Path, file: RemoteFile) -> None:
    algorithm, expected = file.hash.split(":")
    with reading(path, "replace it or set data_dir") as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > file.size:
            found = f"{size:,} bytes instead of {file.size:,}"
        else:
            digest = hashlib.file_digest(opened, algorithm).hexdigest()
            if digest == expected:
                return
            found = f"{algorithm} {digest[:8]}… instead of {expected[:8]}…"
    raise DataError(
        f"{path} is not the expected file: {found}; delete it to fetch it again, or set data_dir"
    )


def _download(url: str, file: RemoteFile, folder: Path) -> str | None:
    """Download and verify; return the reason for a failure in a few words, None on success."""
    # Slow to import; only downloads need it.
    from requests.exceptions import HTTPError, RequestException

    pooch.get_logger().setLevel(logging.WARNING)  # pooch logs to stderr on its own
    log.info("fetching %s", url)
    path = folder / file.name
    try:
        with staging(path) as made:
            # pooch accepts any callable, but its type hint is narrower.
            downloader: Any = partial(_stream, limit=file.size)
            pooch.retrieve(url, file.hash, file.name, made, downloader=downloader)
            # pooch makes files readable by their owner only; apply the user's umask instead, except
            # on a file system without modes.
            with contextlib.suppress(PermissionError):
                (made / file.name).chmod(made.stat().st_mode & 0o666)
            publish(made / file.name, path)
    except HTTPError as error:
        return str(error).split(" for url")[0]
    except RequestException as error:
        return type(error).__name__
    except _TooLargeError:
        return f"more than {file.size:,} bytes"
    except ValueError:
        return "wrong hash"
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; free some space, or set data_dir to "
            "a folder that can be written"
        ) from error
    return None


class _TooLargeError(Exception):
    pass


def _stream(url: str, output_file: Any, _: Any, limit: int) -> None:
    """Downloader for pooch that stops after `limit` bytes."""
    import requests

    # Without this a server may compress the .gz again, and requests would decompress both.
    headers = {"Accept-Encoding": "identity"}
    with (
        requests.get(url, stream=True, timeout=TIMEOUT_SECONDS, headers=headers) as response,
        open(output_file, "wb") as file,
        progress.bar(unit="B", unit_scale=True) as bar,
    ):
        response.raise_for_status()
        length = response.headers.get("Content-Length", "")
        bar.reset(int(length) if length.isdigit() else None)
        for chunk in response.iter_content(CHUNK):
            if file.tell() + len(chunk) > limit:
                raise _TooLargeError
            file.write(chunk)
            bar.update(len(chunk))
