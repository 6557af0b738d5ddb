"""Verified, atomic downloads."""

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
import uuid
import zlib
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlparse

import torch
from tqdm import tqdm

__all__ = ["DownloadError", "download", "verified"]

TIMEOUT = 60


class DownloadError(OSError):
    """A download failed, or the file is not the expected one. No partial file is left."""


def download(
    url: str, sha256: str | None = None, *, directory: str | Path | None = None, progress: bool | None = None
) -> Path:
    """Download a file to torch's hub cache.

    It is written to a temporary file, its hash is verified, and then it is renamed. A valid file in the cache is not
    downloaded again.

    Args:
        url: http or https.
        sha256: the hash or its first digits; None uses those in a name like ``resnet18_224-fc07006c.pth``.
        directory: None is ``checkpoints`` in `torch.hub.get_dir` (``TORCH_HOME``).
        progress: show a bar on stderr; None shows it on a terminal.

    Returns:
        The path of the file.

    Raises:
        DownloadError: the server refused, the connection broke, or the file is not the expected one.
    """
    name = Path(urlparse(url).path).name
    hinted = re.search(r"-([0-9a-f]{8,64})\.", name)
    sha256 = sha256 or (hinted[1] if hinted else None)
    if sha256 is None:  # two URLs with the same file name must not collide
        name = f"{zlib.crc32(url.encode()):08x}-{name}"
    folder = Path(directory or Path(torch.hub.get_dir()) / "checkpoints")
    target = folder / name
    if target.is_file() and (sha256 is None or _hash(target).startswith(sha256)):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    hidden = None if progress is None else not progress
    temporary = folder / f"{name}.{uuid.uuid4().hex}.part"  # unique: other processes may download the same file
    try:
        with temporary.open("xb") as file:
            got, start = _fetch(url, file, tqdm(desc=name, unit="B", unit_scale=True, disable=hidden))
        what = "a web page" if start.lstrip().startswith(b"<") else "another file"
        if sha256 is not None and not got.startswith(sha256):
            source = " (from its name)" if hinted and sha256 == hinted[1] else ""
            raise DownloadError(f"{url} sent {what}: its sha256 is {got}, expected {sha256}{source}")
        if sha256 is None and what == "a web page":
            raise DownloadError(f"{url} sent a web page, not weights")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def verified(path: Path, sha256: str | None) -> Path:
    """Return the path of a local file after checking its hash.

    Raises:
        DownloadError: the hash differs.
    """
    if sha256 is not None and path.is_file() and not (got := _hash(path)).startswith(sha256):
        raise DownloadError(f"{path} is another file: its sha256 is {got}, expected {sha256}")
    return path


def _fetch(url: str, file: BinaryIO, bar: tqdm) -> tuple[str, bytes]:
    """Stream a URL to ``file``. Returns the hash and the first bytes."""
    digest, start, length = hashlib.sha256(), b"", 0
    try:
        with bar, urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            announced = response.headers.get("Content-Length")
            bar.reset(announced and int(announced))
            while chunk := response.read(1 << 20):
                start = start or chunk[:64]
                digest.update(chunk)
                length += len(chunk)
                file.write(chunk)
                bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        error.close()
        raise DownloadError(f"{url}: the server answered {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{url}: {str(error) or type(error).__name__}") from error
    if announced is not None and length != int(announced):
        raise DownloadError(f"{url}: the connection ended after {length} of {announced} bytes")
    return digest.hexdigest(), start


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
