"""From a dataset's name to its official data on the disk: terms, download, checksum, unpacking, in place at once."""

from __future__ import annotations

import datetime
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cssbench
from cssbench import registry
from cssbench.data.archive import Archive, check, declared_size, remove, unpack
from cssbench.data.base import SegDataset
from cssbench.data.download import download
from cssbench.errors import ConfigError, DataError, RunError
from cssbench.lock import FileLock
from cssbench.progress import say, size_text
from cssbench.results import safe_name, write_json

SPARE = 2**26  # bytes that are left free on the disk
RECORD = "fetched.json"


def official(name: str) -> tuple[type[SegDataset], Archive]:
    """The dataset's class, and the archive it is published as. Raises UnknownNameError, PluginError, ConfigError."""
    cls = registry.load_class("datasets", name, SegDataset, ["layout", "folders"])  # type: ignore[type-abstract]
    if not isinstance(cls.archive, Archive):
        known = [n for n, part in registry.parts("datasets").items() if part.distribution == registry.OWN]
        can = [n for n in known if isinstance(registry.load("datasets", n).archive, Archive)]
        reason = cls.archive or "it is not published as one archive that cssbench knows"
        raise ConfigError(f"The dataset {name!r} cannot be fetched: {reason}. Can be fetched: {', '.join(can)}.")
    return cls, cls.archive


def fetch(name: str, root: Path, url: str | None = None, sha256: str | None = None, keep: bool = False) -> Path:
    """Bring the official data of dataset `name` to `root`: the folder it lies in now, which appears whole or not at
    all.

    url: a mirror. sha256: hex digest that the archive must have, instead of the size and digests published. keep: leave
    the archive beside the data. An archive that lies in `root` already is used, checked and left there.
    A folder that is there is left alone.
    Raises ConfigError, DataError.
    """
    cls, archive = official(name)
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise ConfigError(f"--sha256 takes 64 hexadecimal digits, not {sha256!r}.")
    if sha256:
        archive = replace(archive, size=None, digests={"sha256": sha256})
    try:
        folder, file = root / safe_name(archive.folder), root / safe_name(archive.file)
    except RunError as error:
        raise DataError(f"The archive of dataset {name!r}: {error}") from None
    if folder.exists():
        say(f"{folder} is there already; nothing was fetched. `cssbench data verify {root}` looks whether it is whole.")
        return folder
    lock, missing = FileLock(root / f".{archive.folder}.lock"), [p for p in (root, *root.parents) if not p.exists()]
    theirs = file.exists()
    if not lock.acquire():
        raise DataError(f"Another process fetches into {root}. Wait for it, or name another --root.")
    try:
        if not file.exists():
            download(
                url or archive.url, file, archive.size or archive.limit, lambda rest, whole: _room(root, rest + whole)
            )
        found = check(file, archive.size, archive.digests)
        if "sha256" not in archive.digests:
            known = ", ".join(["size"] * bool(archive.size) + [name.upper() for name in sorted(archive.digests)])
            known = known or "nothing"
            say(
                f"No SHA-256 is published for this archive; checked: {known}, then the CRCs of its members. "
                f"Its SHA-256 is {found['sha256']}. It stands in {RECORD}: give it as --sha256 wherever the same data "
                f"are wanted."
            )
        _unpack(cls, archive, file, folder, _record(archive, url, file, found))
    finally:
        lock.path.unlink(missing_ok=True)
        lock.release()
        for made in missing:  # nothing is left of a fetch that brought nothing
            if made.is_dir() and not any(made.iterdir()):
                made.rmdir()
    if not keep and not theirs:
        file.unlink()
    return folder


def _unpack(cls: type[SegDataset], archive: Archive, file: Path, folder: Path, record: dict[str, Any]) -> None:
    _room(folder.parent, declared_size(file, archive.limit))
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        unpack(file, temporary, archive.limit)
        inside = temporary / folder.name
        if not inside.is_dir():
            raise DataError(f"{file} holds no folder {folder.name}: it is not the archive of that dataset.")
        for split, expected in archive.images.items():
            there = len(cls(inside).stems(split))
            if there != expected:
                raise DataError(
                    f"{file} holds {there} {split} images, expected {expected}: it is not the official archive."
                )
        write_json(inside / RECORD, record)
        os.rename(inside, folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be put in place: {error.strerror or error}.") from error
    finally:
        remove(temporary)


def _record(archive: Archive, url: str | None, file: Path, digests: dict[str, str]) -> dict[str, Any]:
    """What fetched.json says."""
    return {
        "url": url or archive.url,
        "bytes": file.stat().st_size,
        "digests": digests,
        "checked": sorted(archive.digests),
        "terms_accepted": True,
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": cssbench.__version__,
    }


def _room(root: Path, size: int) -> None:
    """Raises DataError when the disk cannot take `size` bytes: what is still to come of an archive, and what it holds,
    which is about as large as itself, since pictures are compressed already."""
    there = next(p for p in (root.absolute(), *root.absolute().parents) if p.exists())
    need, free = size + SPARE, shutil.disk_usage(there).free
    if free < need:
        raise DataError(
            f"{root} has {size_text(free)} free, and {size_text(need)} are needed. Free disk space, or name another "
            f"--root; what has arrived is kept."
        )
