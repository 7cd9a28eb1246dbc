"""Archives of strangers: which one a dataset is published as, is it that one, and unpacking it without trusting it."""

from __future__ import annotations

import hashlib
import lzma
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from cssbench.errors import DataError
from cssbench.progress import size_text

MAX_MEMBERS = 1_000_000
PIECE = 2**20  # bytes that are read at a time
DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,
    NotImplementedError,
    RuntimeError,
)


@dataclass(frozen=True)
class Archive:
    """The archive that a dataset is published as; `SegDataset.archive` of a dataset that `cssbench data fetch` gets.

    url: its official address (http or https). folder: the folder in it that holds the data, and the only one used.
    terms: what must be accepted, and where it stands in full. size: its bytes; digests: name of the algorithm -> hex
    digest, as published; either may be unknown.
    limit: bytes that its members may take together. images: images of each split, as the dataset's authors count them.
    """

    url: str
    folder: str
    terms: str
    size: int | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    limit: int = 2**36
    images: Mapping[str, int] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """What the archive is called on the disk."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Member:
    """One file or folder of an archive. size: bytes as declared, 0 for a folder."""

    name: str
    size: int
    folder: bool
    entry: zipfile.ZipInfo | tarfile.TarInfo


def digests_of(path: Path, names: set[str]) -> dict[str, str]:
    """Hex digests of a file, read once."""
    made = {name: hashlib.new(name, usedforsecurity=False) for name in names}
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            for digest in made.values():
                digest.update(piece)
    return {name: digest.hexdigest() for name, digest in made.items()}


def check(path: Path, size: int | None, digests: Mapping[str, str]) -> dict[str, str]:
    """The digests of an archive, SHA-256 among them. Raises DataError when its size or one of them is not as
    expected."""
    there = path.stat().st_size
    if size is not None and there != size:
        raise _other(path, f"it has {there} bytes, expected {size}")
    found = digests_of(path, {"sha256", *digests})
    for name, digest in digests.items():
        if found[name] != digest.lower():
            raise _other(path, f"its {name.upper()} is {found[name]}, expected {digest.lower()}")
    return found


def _other(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} is not the archive that was asked for: {reason}. Nothing of it was unpacked. Remove it and fetch it "
        f"again; when that does not help, it was changed on its way or at its address."
    )


def declared_size(path: Path, limit: int) -> int:
    """Bytes that all members of a zip or tar archive say they take, every one checked. Raises DataError."""
    with _opened(path) as archive:
        return sum(member.size for member in _members(path, archive, limit))


def unpack(path: Path, into: Path, limit: int) -> None:
    """Write the members of a zip or tar archive below `into`, a folder that is made for it.

    All are checked before the first is written. Raises DataError at a member that is no plain file or folder, that
    would lie elsewhere or on another one, that is encrypted or damaged (a zip's own CRC), or larger than it says; when
    all together take more than `limit` bytes; and when the disk is full. What was written until then is left there.
    """
    with _opened(path) as archive:
        members = _members(path, archive, limit)
        into.mkdir(parents=True)
        for member in members:
            target = into.joinpath(*member.name.split("/"))
            (target if member.folder else target.parent).mkdir(parents=True, exist_ok=True)
            if not member.folder:
                with _content(archive, member.entry) as source, target.open("xb") as file:
                    _copy(path, member, source, file)


def _copy(path: Path, member: Member, source: IO[bytes], file: IO[bytes]) -> None:
    left = member.size
    while piece := source.read(min(PIECE, left + 1)):
        left -= len(piece)
        if left < 0:
            break
        file.write(piece)
    if left:
        raise DataError(f"{path}: the member {member.name!r} does not hold the {member.size} bytes that it says.")


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    """The archive, whose faults, wherever they show, become DataError."""
    try:
        with zipfile.ZipFile(path) if zipfile.is_zipfile(path) else tarfile.open(path) as archive:
            yield archive
    except OSError as error:
        raise DataError(f"{path} cannot be unpacked: {error.strerror or error}.") from error
    except DAMAGED as error:
        raise DataError(
            f"{path} is damaged, or neither a zip nor a tar archive ({str(error).partition(': ')[0]}). Remove it and "
            f"fetch it again."
        ) from error


def _content(archive: zipfile.ZipFile | tarfile.TarFile, entry: zipfile.ZipInfo | tarfile.TarInfo) -> IO[bytes]:
    if isinstance(archive, zipfile.ZipFile):
        assert isinstance(entry, zipfile.ZipInfo)
        return archive.open(entry)
    assert isinstance(entry, tarfile.TarInfo)
    content = archive.extractfile(entry)
    assert content is not None  # links were refused
    return content


def _members(path: Path, archive: zipfile.ZipFile | tarfile.TarFile, limit: int) -> list[Member]:
    """All members, checked. Raises DataError naming the first that must not be unpacked."""
    listed = map(_zip_member, archive.infolist()) if isinstance(archive, zipfile.ZipFile) else map(_tar_member, archive)
    found: list[Member] = []
    files: set[str] = set()
    folders: set[str] = set()
    total = 0
    for member, fault in listed:
        fault = fault or _misplaced(member.name)
        if not fault and not member.folder and member.name in files:
            fault = "is there twice"
        if fault:
            raise _unsafe(path, f"the member {member.name[:200]!r} {fault}")
        (folders if member.folder else files).add(member.name)
        folders |= {member.name[: slash.start()] for slash in re.finditer("/", member.name)}
        total += member.size
        found.append(member)
        if total > limit or len(found) > MAX_MEMBERS:
            raise _unsafe(path, f"its members take more than {size_text(limit)}, or are more than {MAX_MEMBERS}")
    if both := sorted(files & folders):
        raise _unsafe(path, f"the member {both[0][:200]!r} is a file and a folder")
    return found


def _unsafe(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is not safe to unpack: {reason}. Nothing was unpacked.")


def _misplaced(name: str) -> str:
    """What is wrong with the place that a member names; empty: nothing."""
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "has an absolute path"
    if "\\" in name or any(not c.isprintable() for c in name):
        return "has a name with a backslash or a control character"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "leads out of its folder, or has no plain path"
    return ""


def _zip_member(entry: zipfile.ZipInfo) -> tuple[Member, str]:
    mode = entry.external_attr >> 16
    kind, fault = stat.S_IFMT(mode), ""
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        fault = "is a link or a device"
    elif entry.flag_bits & 1:
        fault = "is encrypted"
    elif entry.orig_filename != entry.filename:  # zipfile cuts at a NUL and turns the system's separator
        fault = "has a name with a control character"
    return Member(entry.filename.removesuffix("/"), entry.file_size, entry.is_dir(), entry), fault


def _tar_member(entry: tarfile.TarInfo) -> tuple[Member, str]:
    fault = "" if entry.isdir() or (entry.isreg() and not entry.issparse()) else "is a link, a device or a sparse file"
    name = entry.name.removeprefix("./").removesuffix("/")
    return Member(name, entry.size if entry.isreg() else 0, entry.isdir(), entry), fault


def remove(folder: Path) -> None:
    """Remove what was unpacked, or part of it."""
    shutil.rmtree(folder, ignore_errors=True)
