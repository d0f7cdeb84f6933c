"""The files of a source, in a folder or in a tar archive; read in any order, from any thread.

Members of an archive are never written under the names they have in it: a compressed archive is decompressed as a whole
into an unnamed temporary file, which disappears when the process ends, however it ends.
"""

import bz2
import errno
import gzip
import hashlib
import io
import itertools
import lzma
import os
import tarfile
import tempfile
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, cast

from arraytp.disk import real, refuse_special
from arraytp.errors import UserError

MAX_DEPTH = 4
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# The largest official file that is read whole has 155 MB, and images of 2**26 pixels seldom have more than 64 MB.
MAX_FILE_BYTES = 2**28
# Images hardly compress, but small ones, padded by tar, shrink to a twentieth.
_MOST_RATIO = 100
_UNSUSPICIOUS = 2**28
_MOST_HEADER = 2**24
_BLOCK = 512
_UNPACKERS: dict[bytes, Callable[[BinaryIO], io.BufferedIOBase]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"BZh": bz2.BZ2File,
}


_Member = tuple[str, int, int]


@dataclass(frozen=True)
class Files:
    """Files by name: `names` are relative to `root`, separated by `/`, and sorted as strings.

    `read` takes a row of `names` and returns the file's content, or raises OSError. `state` changes when an image file
    or the archive does, but not when another file grows, such as a log or a data set packed into the source's folder.
    """

    root: Path
    names: list[str]
    read: Callable[[int], bytes]
    state: str

    def content(self, row: int) -> bytes:
        """Return the content of a file that is required; UserError if it cannot be read."""
        try:
            return self.read(row)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{self.root}: {self.names[row]}: cannot be read: {reason}") from error

    def find(self, name: str) -> int | None:
        """Return the row of a name, None if it is not there."""
        row = bisect_left(self.names, name)
        return row if row < len(self.names) and self.names[row] == name else None


@contextmanager
def open_files(src: Path, dst: Path) -> Iterator[Files]:
    """Open a folder (image files at any depth, others to a depth of four), or a tar archive: plain, gzip, xz or bzip2.

    A compressed archive is decompressed beside `dst`, in its nearest existing parent folder. UserError if `src` is
    neither, is damaged or truncated, or is an archive with members that are neither files nor folders, or lead out of
    it.
    """
    if src.is_dir():
        names = sorted(_walk(src, "", MAX_DEPTH))
        state = fingerprint(f"{name} {file_state(src / name)}" for name in names if is_image(name))
        yield Files(src, names, lambda row: _read_whole(src / names[row]), state)
        return
    refuse_special(src)
    try:
        file = src.open("rb")
    except FileNotFoundError:
        raise UserError(f"{src}: no such folder or archive") from None
    except OSError as error:
        raise UserError(f"{src}: cannot be read: {error.strerror}") from error
    with file:
        unpack = _unpacker(src, file)
        if unpack is None:
            yield _only(src, file)
            return
        with _unnamed_file(src, _place_beside(real(dst))) as plain:
            _unpack(src, unpack(file), plain)
            yield _only(src, plain)


def _unpacker(src: Path, file: io.BufferedReader) -> Callable[[BinaryIO], io.BufferedIOBase] | None:
    """Return the decompressor of an archive, recognised by its first bytes; None if it is not compressed."""
    try:
        start = file.peek(8)
    except OSError as error:
        raise UserError(f"{src}: cannot be read: {error.strerror}") from error
    return next((unpack for magic, unpack in _UNPACKERS.items() if start.startswith(magic)), None)


def _read_whole(path: Path) -> bytes:
    with path.open("rb") as file:
        _check_length(os.fstat(file.fileno()).st_size)
        return file.read()


def _read_part(handle: int, size: int, start: int) -> bytes:
    _check_length(size)
    return os.pread(handle, size, start)


def _check_length(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, f"{size:,} bytes are more than {MAX_FILE_BYTES:,}")


def is_image(name: str) -> bool:
    """Return whether a file's extension is that of an image."""
    return name.lower().endswith(_IMAGE_SUFFIXES)


def file_state(path: Path) -> str:
    """Return a file's size and time of last modification, or the reason why they cannot be read."""
    try:
        status = path.stat()
    except OSError as error:
        return f"{error.strerror}"
    return f"{status.st_size} {status.st_mtime_ns}"


def fingerprint(parts: Iterable[str]) -> str:
    """Return the SHA-256 of a sequence of strings."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _only(src: Path, file: IO[bytes]) -> Files:
    index = _Index()
    index.extend(file, _members(str(src), file))
    return index.files(src, fingerprint([file_state(src)]))


def _walk(root: Path, folder: str, depth: int) -> Iterator[str]:
    try:
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name = folder + entry.name
                if _is_folder(entry):
                    # A symbolic link may lead back to a folder that contains it.
                    if depth > 1 or not entry.is_symlink():
                        yield from _walk(root, f"{name}/", depth - 1)
                elif depth < 1 and not is_image(name):
                    continue
                # Opening a pipe would wait for its other end. A link that is broken or leads to itself is listed, and
                # reported when it is read.
                elif (entry.is_symlink() and not os.path.exists(entry.path)) or entry.is_file():
                    yield name
    except OSError as error:
        raise UserError(f"{root / folder}: cannot be read: {error.strerror}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        # A link that leads to itself affects no other entry.
        if error.errno != errno.ELOOP:
            raise
        return False


def _place_beside(dst: Path) -> Path:
    """Return the folder that holds DST, or will; DST itself if it is a separate volume or that folder is read-only."""
    beside = next(parent for parent in dst.parents if parent.is_dir())
    if dst.is_dir() and (not os.access(beside, os.W_OK) or beside.stat().st_dev != dst.stat().st_dev):
        return dst
    return beside


def _unnamed_file(src: Path, folder: Path) -> IO[bytes]:
    # Preferably not in DST itself: some network file systems give it a name, which a pack takes for a foreign file.
    try:
        return tempfile.TemporaryFile(dir=folder)
    except OSError as error:
        raise UserError(f"{src}: cannot be unpacked in {folder}: {error.strerror}; choose another DST") from error


def _unpack(src: Path, packed: io.BufferedIOBase, plain: IO[bytes]) -> None:
    try:
        with packed:
            _copy(src, packed, plain)
        plain.seek(0)
    except EOFError:
        raise UserError(f"{src}: truncated archive; fetch it again") from None
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{src}: damaged archive ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{src}: cannot be unpacked: {error.strerror or error}") from error


def _copy(src: Path, packed: io.BufferedIOBase, plain: IO[bytes]) -> None:
    """Decompress an archive; UserError unless it begins like a tar archive and expands no more than images can."""
    head = packed.read(_BLOCK)
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise UserError(f"{src}: not a tar archive, or damaged ({error}); fetch it again") from error
    plain.write(head)
    most = max(_UNSUSPICIOUS, _MOST_RATIO * src.stat().st_size)
    while block := packed.read(2**20):
        if plain.tell() > most:
            raise UserError(
                f"{src}: unpacks to more than {_MOST_RATIO} times its size, which archives of images do not; refused"
            )
        plain.write(block)


class _Headers:
    """A file to read a tar archive's headers from; a header of an implausibly large size counts as damage."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int) -> bytes:
        if size > _MOST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


@contextmanager
def open_archives(root: Path, archives: Mapping[str, Path]) -> Iterator[Files]:
    """Open plain tar archives, given by folder name, as folders of one tree, without unpacking them.

    A member `NAME.tar`, an archive itself, counts as a folder `NAME` with its own members. Messages name `root`.
    UserError like `open_files`.
    """
    index = _Index()
    with ExitStack() as opened:
        for folder, path in archives.items():
            try:
                file = opened.enter_context(path.open("rb"))
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from error
            for name, start, size in list(_members(str(path), file)):
                # AppleDouble files, which archivers of macOS add beside a file.
                if PurePosixPath(name).name.startswith("._"):
                    continue
                if name.endswith(".tar"):
                    inner = _members(f"{path}: {name}", file, start, start + size)
                    index.extend(file, inner, f"{folder}/{name.removesuffix('.tar')}/")
                else:
                    index.extend(file, [(name, start, size)], f"{folder}/")
        yield index.files(root, fingerprint(f"{path} {file_state(path)}" for path in archives.values()))


class _Index:
    """The location of each file in plain tar archives, in about 100 bytes of memory per file."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._handles, self._starts, self._sizes = array("i"), array("q"), array("q")

    def extend(self, file: IO[bytes], members: Iterable[_Member], prefix: str = "") -> None:
        for name, start, size in members:
            self._names.append(prefix + name)
            self._handles.append(file.fileno())
            self._starts.append(start)
            self._sizes.append(size)

    def files(self, root: Path, state: str) -> Files:
        order = sorted(range(len(self._names)), key=self._names.__getitem__)
        names = [self._names[i] for i in order]
        twice = next((name for name, after in itertools.pairwise(names) if name == after), None)
        if twice is not None:
            raise UserError(f"{root}: holds {twice!r} twice, expected each file once")
        handles, starts, sizes = (
            array(part.typecode, (part[i] for i in order)) for part in (self._handles, self._starts, self._sizes)
        )
        return Files(root, names, lambda row: _read_part(handles[row], sizes[row], starts[row]), state)


def _members(where: str, file: IO[bytes], start: int = 0, stop: int | None = None) -> Iterator[_Member]:
    """Yield the files of a plain tar archive that occupies a file from byte `start` to `stop`."""
    handle = file.fileno()
    stop = os.fstat(handle).st_size if stop is None else stop
    file.seek(start)
    try:
        with tarfile.open(fileobj=cast(IO[bytes], _Headers(file)), mode="r:") as tar:
            while (member := tar.next()) is not None:
                # tarfile would keep a kilobyte for every member.
                tar.members.clear()  # type: ignore[attr-defined]
                name = _member_name(where, member)
                if name is not None:
                    yield name, member.offset_data, member.size
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise UserError(f"{where}: not a tar archive, or damaged ({error}); fetch it again") from error
    # tarfile takes an unreadable header, or none at all, for the end of the archive.
    if end + _BLOCK > stop or os.pread(handle, _BLOCK, end) != bytes(_BLOCK):
        raise UserError(f"{where}: truncated or damaged archive at byte {end - start}; fetch it again")


def _member_name(where: str, member: tarfile.TarInfo) -> str | None:
    """Return the name of a plain file, None for a folder; refuse everything else."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{where}: refused: member {member.name!r} leads out of the archive")
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        raise UserError(
            f"{where}: refused: member {member.name!r} is a link, device or sparse file, expected files only"
        )
    return str(path)
