"""Fetch the official files of freely available data sets, and verify the checksums stated by their publishers.

A partial download is kept beside its destination as `.NAME.part`, and the next call requests the rest. The file gets
its name once its checksum is right.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from arraytp.errors import UserError

_BLOCK_BYTES = 2**16
_TIMEOUT_SECONDS = 30

Progress = Callable[[str, int, int | None], None]
"""Called with a file's name, the number of bytes that have arrived, and its size if the server states it."""


@dataclass(frozen=True)
class Source:
    """Where files are: `addresses` of the folders that hold them, tried in turn; `files` maps each name to its MD5."""

    addresses: tuple[str, ...]
    files: Mapping[str, str]


def _idx_files(*checksums: str) -> dict[str, str]:
    names = [f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    return dict(zip(names, checksums, strict=True))


_CIFAR = ("https://www.cs.toronto.edu/~kriz", "https://cave.cs.toronto.edu/kriz")

SOURCES: Mapping[str, Source] = {
    "mnist": Source(
        ("https://storage.googleapis.com/cvdf-datasets/mnist", "https://ossci-datasets.s3.amazonaws.com/mnist"),
        _idx_files(
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "fashion-mnist": Source(
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",),
        _idx_files(
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
    "kmnist": Source(
        ("http://codh.rois.ac.jp/kmnist/dataset/kmnist",),
        _idx_files(
            "bdb82020997e1d708af4cf47b453dcf7",
            "e144d726b3acfaa3e44228e80efcd344",
            "5c965bf0a639b31b8f53240b1b52f4d7",
            "7320c461ea6c1c855c0b718fb2a4b134",
        ),
    ),
    "cifar10": Source(_CIFAR, {"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"}),
    "cifar100": Source(_CIFAR, {"cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85"}),
}


def fetch(source: Source, folder: Path, progress: Progress) -> None:
    """Fetch the files of a source that a folder lacks, or holds with a wrong checksum.

    UserError if Pooch is not installed, the folder cannot be written to, or no address has a file with the right
    checksum.
    """
    pooch = _imported("pooch")
    requests = _imported("requests")
    pooch.get_logger().setLevel("WARNING")
    for name, md5 in source.files.items():

        def download(url: str, output: str, _pooch: Any, name: str = name) -> None:
            part = folder / f".{name}.part"
            _download(requests, url, part, lambda done, total: progress(name, done, total))
            part.replace(output)

        failures = []
        for address in source.addresses:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                pooch.retrieve(f"{address}/{name}", f"md5:{md5}", name, folder, downloader=download)
                break
            except requests.RequestException as error:
                failures.append(f"{address}/{name}: {' '.join(str(error).split())}")
            except ValueError:
                failures.append(f"{address}/{name}: not the official file, its MD5 is not {md5}")
            except OSError as error:
                raise UserError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from error
        else:
            raise UserError(f"{'; '.join(failures)}; the same command continues the download")


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"data fetch: {name} cannot be imported ({error}); install arraytp[fetch]") from error


def _download(requests: Any, url: str, part: Path, progress: Callable[[int, int | None], None]) -> None:
    """Complete a partial file, keeping whatever arrives; `requests.RequestException` if the server ends too early."""
    present = part.stat().st_size if part.exists() else 0
    # Request files as they are: some servers decompress gzipped ones.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={present}-"} if present else {})
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_SECONDS) as response:
        if present and response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            # No bytes are missing; the checksum tells whether the file is right.
            return
        response.raise_for_status()
        goes_on = response.status_code == HTTPStatus.PARTIAL_CONTENT
        done = present if goes_on else 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        with part.open("ab" if goes_on else "wb") as file:
            for block in response.iter_content(_BLOCK_BYTES):
                file.write(block)
                done += len(block)
                progress(done, total)
