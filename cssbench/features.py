"""What a frozen encoder makes of images, kept in files instead of made again: a bounded store on disk.

ROOT/<encoder>/<key[:2]>/<key>.safetensors   the tensors of one view, or of one head on it, with their CRC-32
ROOT/<encoder>/.lock                         held by every process that uses that encoder's files, shared

`<encoder>` is a digest of all that the encoder's output depends on: runs, steps and scenarios with the same encoder
share its files. A file is written beside its place and renamed, and one that is damaged counts as missing, so a crash
costs the file that was being written. Files are mapped into memory.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from contextlib import suppress
from pathlib import Path
from time import sleep
from typing import Any

import torch
from torch import Tensor

from cssbench import checkpoint, provenance
from cssbench.base_facts import PACKAGES, sources, weights_digest
from cssbench.data.presence import cache_folder
from cssbench.errors import ConfigError
from cssbench.lock import FileLock
from cssbench.models.segmenter import Segmenter
from cssbench.progress import say, size_text

GIB = 2**30
SUFFIX = ".safetensors"
RESCAN = 500  # files written between two looks at what other processes wrote


def encoder_digest(model: Segmenter, settings: dict[str, Any]) -> str:
    """SHA-256 (hex) of what `model.encode` depends on: weights outside the heads, options, code, packages, and what
    `settings` adds (precision, device)."""
    facts = {
        "weights": weights_digest(model, without="heads."),
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "options": model.config.model_dump(mode="json"),
        "sources": sources(),
        "packages": {name: provenance.package_version(name) for name in PACKAGES},
        **settings,
    }
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()


def key_of(*facts: Any) -> str:
    """SHA-256 (hex) of plain values."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def path_of(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}{SUFFIX}"


def read_tensors(folder: Path, key: str) -> dict[str, Tensor] | None:
    """The tensors kept under `key`, mapped from the file; None where there are none, or they are damaged."""
    found = checkpoint.map_tensors(path_of(folder, key))
    if found is None:
        return None
    tensors, about = found
    return tensors if about.get("crc32") == checksum(tensors) else None


def checksum(tensors: dict[str, Tensor]) -> str:
    """CRC-32 of the tensors' bytes, in the order of their names."""
    found = 0
    for _, tensor in sorted(tensors.items()):
        found = zlib.crc32(raw_bytes(tensor), found)
    return str(found)


def raw_bytes(tensor: Tensor) -> Any:
    """The tensor's bits, as something to compute a digest of."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


class FeatureStore:
    """The files of one encoder below `root`, which together with those of all other encoders stay below `max_gib`.

    Where a file would pass the bound, other encoders' folders that no process uses are removed, the one that was used
    longest ago first; if that does not help, nothing more is kept, and the reader makes do with what there is.
    A context: leaving it lets go of the folder. `folder` may be read by other processes (`read_tensors`).
    Raises ConfigError when `root` cannot be written.
    """

    def __init__(self, root: Path, encoder: str, max_gib: float):
        self.root, self.folder, self.max_bytes = root, root / encoder[:32], int(max_gib * GIB)
        self.read_files = self.written_files = self.written_bytes = 0
        self.full = self.told = False
        self.lock = FileLock(self.folder / ".lock", shared=True)
        self._hold()
        self.total = size_of(root)

    def _hold(self) -> None:
        """Take the folder, also where another process is just removing it."""
        while not (self.lock.acquire() and self.lock.path.exists()):
            self.lock.release()
            sleep(0.05)
        os.utime(self.folder)

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.lock.release()

    def read(self, key: str) -> dict[str, Tensor] | None:
        found = read_tensors(self.folder, key)
        self.read_files += found is not None
        return found

    def counts(self) -> dict[str, int]:
        """Files read and written by this process, and the bytes written."""
        return {"read": self.read_files, "written": self.written_files, "bytes": self.written_bytes}

    def announce(self, what: str, files: int, tensors: dict[str, Tensor]) -> None:
        """Say once how much `files` like `tensors` will take, before the first of them is written."""
        if self.told:
            return
        self.told = True
        wanted = files * sum(t.numel() * t.element_size() for t in tensors.values())
        free = _free(self.root)
        say(
            f"{what}: up to {size_text(wanted)} in {self.folder} (cache.max_gib {self.max_bytes / GIB:g}, of which "
            f"{size_text(self.total)} are taken; {size_text(free)} free on the disk)"
        )
        if wanted > min(self.max_bytes, free):
            say("  that is more than fits: what does not is made anew each time it is needed")

    def write(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors (on the CPU). Where there is no room, say so once and keep nothing more."""
        if self.full:
            return
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        content = checkpoint.encode_tensors(tensors, {"crc32": checksum(tensors)})
        if self.written_files % RESCAN == RESCAN - 1:
            self.total = size_of(self.root)
        if self.total + len(content) > self.max_bytes and not self._make_room(len(content)):
            self._stop(f"cache.max_gib = {self.max_bytes / GIB:g} is reached")
            return
        path = path_of(self.folder, key)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            self._stop(str(error.strerror or error))
            return
        self.total += len(content)
        self.written_files, self.written_bytes = self.written_files + 1, self.written_bytes + len(content)

    def _stop(self, reason: str) -> None:
        self.full = True
        say(f"no more features are kept in {self.root}: {reason}. The run goes on, only slower.")

    def _make_room(self, needed: int) -> bool:
        """Remove folders that nobody uses until `needed` bytes fit; whether they do."""
        self.total = size_of(self.root)
        for folder in sorted((p for p in self.root.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime):
            if self.total + needed <= self.max_bytes:
                break
            lock = FileLock(folder / ".lock")
            if folder != self.folder and lock.acquire():
                shutil.rmtree(folder, ignore_errors=True)
                self.total = size_of(self.root)
            lock.release()
        return self.total + needed <= self.max_bytes


def size_of(root: Path) -> int:
    """Bytes of the files of all encoders; leavings of processes that were killed while they wrote are removed."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            with suppress(OSError):
                if name.endswith(".tmp") and not _alive(name):
                    path.unlink()
                else:
                    total += path.stat().st_size
    return total


def _alive(name: str) -> bool:
    """Whether the process that writes the temporary file `.<key>.safetensors.<pid>.tmp` still runs."""
    number = name.split(".")[-2]
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        return True
    return True


def _free(root: Path) -> int:
    return shutil.disk_usage(root).free


def store_folder(named: str | None) -> Path:
    """`cache.folder`, or "features" below `cache_folder()`. Raises ConfigError when it cannot be made."""
    root = Path(named) if named else cache_folder() / "features"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cache.folder {str(root)!r} cannot be made: {error.strerror or error}. Name a folder that can be written."
        ) from None
    return root
