"""The run folder: what a run leaves behind, written atomically and read back without torch.

    DIR/
      config.toml           the resolved recipe
      provenance.json       command, versions, hardware, data fingerprint, seeds (see `cssbench.provenance`)
      scenario.json         classes, groups, mode; per step the number of images and the SHA-256 of their stems
      steps/00/             one folder per finished step
        model.safetensors   weights
        method.safetensors  the method's own state (tensors and plain data)
        matrices.npz        int64 confusion matrices, raw class id x predicted class id (see `StepRecord.matrices`)
        samples/*.png       predictions for the sample images, palette PNG of class ids
        depths/*.png        blocks that the token at each pixel went through, palette PNG; of models that drop tokens
        record.json         numbers, and the SHA-256 of the files beside it; written last: a step with it is finished
      samples/              the sample images (<stem>.image.png) and their truth (<stem>.truth.png)
      logs/train-00.csv     step, iteration, name, value: every logged loss term, one file per step
      logs/tensorboard/

Names read back from these files never become paths unchecked: `safe_name` refuses separators and dots.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tomllib
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cssbench.config import RunConfig, validate
from cssbench.errors import RunError, fault

SCHEMA = 1
LONGEST = 150  # characters of an image's name that go into file names unchanged
RUN_FILES = ("config.toml", "provenance.json", "scenario.json")


def safe_name(name: str) -> str:
    """`name` when it can stand as one file name; raises RunError otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.\-]*[A-Za-z0-9_\-])?", name) or ".." in name:
        raise RunError(f"{name!r} cannot be used as a file name (letters, digits, '_', '-' and inner dots only).")
    return name


def image_name(stem: str) -> str:
    """The file name for the image `stem`: itself where that is safe, else its letters and part of its SHA-256."""
    try:
        if len(stem) <= LONGEST:
            return safe_name(stem)
    except RunError:
        pass
    return f"{re.sub('[^A-Za-z0-9]+', '_', stem)[:80]}-{hashlib.sha256(stem.encode()).hexdigest()[:8]}"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; renamed onto it (after fsync) when the block ends, removed when it fails.

    Raises RunError when the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(
            f"{path} could not be written: {error.strerror or error}. What was there before is untouched; "
            f"free disk space or mend the permissions, then `cssbench resume` the run."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Raises RunError when the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise RunError(f"{path} is missing: {path.parent} is not a complete run folder.") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({fault(error)}).") from None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(content: dict[str, Any]) -> str:
    """SHA-256 (hex) of a record's JSON, keys sorted, without its `digest`: tells an edited record from the one written.

    It guards against accidents and quiet edits, not against somebody who computes it anew.
    """
    rest = json.loads(json.dumps({key: value for key, value in content.items() if key != "digest"}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class StepRecord:
    """What one finished step left. `matrices` maps a key to a (K+1, K+1) int64 array: raw class id (row, 0 = void)
    x predicted class id (column, 0 = background), over the whole evaluated split.

    Keys: `<geometry>.<rule>` with geometry `full` or `crop` and rule `all` (argmax over all outputs; a model without
    a background output predicts 0 where no score reaches its threshold) or `foreground` (argmax over classes only).
    The last step also has `<geometry>.<rule>.upto<t>`: the same with the outputs of steps 0..t alone, which tells
    what parameters forgot (compare with step t's own matrix) from what later classes took away.
    """

    index: int
    content: dict[str, Any]
    folder: Path

    @cached_property
    def matrices(self) -> dict[str, np.ndarray]:
        try:
            # Opened here, because numpy leaves a damaged archive open.
            with (self.folder / "matrices.npz").open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            # NumPy's own ValueError tells how to run what a pickle holds.
            reason = "it is no archive of arrays" if isinstance(error, ValueError) else error
            raise RunError(f"{self.folder / 'matrices.npz'} is missing or damaged ({reason}).") from None

    def samples(self) -> dict[str, Path]:
        """Predictions of the sample images: stem -> palette PNG."""
        return {p.stem: p for p in sorted((self.folder / "samples").glob("*.png"))}

    def depth_maps(self) -> dict[str, Path]:
        """How deep the tokens of the sample images went: stem -> palette PNG; empty where none were dropped."""
        return {p.stem: p for p in sorted((self.folder / "depths").glob("*.png"))}

    @property
    def tokens(self) -> dict[int, float] | None:
        """Number of encoder blocks -> share of the tokens that went through so many, over all forward passes of the
        evaluation; None for a model that drops none, and where it was not recorded. Raises RunError when damaged."""
        content = self.content.get("tokens")
        if content is None:
            return None
        sound = isinstance(content, dict) and all(key.isdecimal() for key in content)
        if not (sound and all(map(_is_size, content.values())) and abs(sum(content.values()) - 1) < 1e-6):
            raise self._damaged("tokens", "the share of tokens by number of blocks, together 1")
        return {int(depth): float(share) for depth, share in sorted(content.items(), key=lambda item: int(item[0]))}

    @property
    def gflops(self) -> dict[str, Any] | None:
        """Cost in 10^9 multiply-adds, the papers' GFLOPs, as `cssbench.profile` counts on the first evaluated images:
        `per_pass`, mean over forward passes (one window where images are predicted by sliding window); `per_image`, all
        passes of an image; `images`, how many; `geometry`. None where not counted. Raises RunError when damaged."""
        content = self.content.get("gflops")
        if content is None:
            return None
        names = ("per_pass", "per_image", "images")
        if not (isinstance(content, dict) and all(_is_size(content.get(name)) for name in names)):
            raise self._damaged("gflops", f"numbers named {', '.join(names)}")
        return content

    def _damaged(self, name: str, expected: str) -> RunError:
        return RunError(
            f"{self.folder / 'record.json'} is damaged: {name!r} must hold {expected}. Evaluate the run again with "
            f"`cssbench evaluate`."
        )


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _is_scenario(content: Any) -> bool:
    """Whether scenario.json has what every reader relies on: names, and the class ids of at least one step."""
    try:
        named = all(isinstance(content[key], str) for key in ("name", "dataset", "mode"))
        groups = [step["new"] for step in content["steps"]]
    except (KeyError, TypeError):
        return False
    full = bool(groups) and all(isinstance(group, list) and group for group in groups)
    return named and full and all(isinstance(c, int) and c > 0 for group in groups for c in group)


@dataclass
class RunFolder:
    """A run folder, for reading and writing. `read` opens an existing one."""

    path: Path
    config: RunConfig
    scenario: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> RunFolder:
        """Raises RunError when `path` is not a run folder, is damaged, or of another schema version."""
        path = Path(path)
        try:
            content = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
        except OSError:
            below = sorted(file.parent.name for file in path.glob("*/config.toml"))
            inside = (
                f" Below it lie {', '.join(below[:8])}{', ...' if len(below) > 8 else ''}: name one." if below else ""
            )
            raise RunError(
                f"{path} is not a run folder: it has no config.toml.{inside or ' `cssbench run` makes one.'}"
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RunError(f"{path / 'config.toml'} is damaged ({fault(error)}).") from None
        provenance, scenario = read_json(path / "provenance.json"), read_json(path / "scenario.json")
        # The schema first: a folder of another version may hold other keys, and is not damaged for that.
        if isinstance(provenance, dict) and provenance.get("schema") != SCHEMA:
            raise RunError(f"{path} has schema {provenance.get('schema')}; this cssbench reads schema {SCHEMA}.")
        if not isinstance(provenance, dict) or not _is_scenario(scenario):
            raise RunError(f"{path} is damaged: provenance.json or scenario.json lacks what `cssbench run` writes.")
        return cls(path, validate(content, str(path / "config.toml")), scenario, provenance)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def create(self) -> None:
        """Write config, provenance and scenario. Raises RunError when the folder already holds a run."""
        if (self.path / "config.toml").exists():
            raise RunError(f"{self.path} already holds a run. `cssbench resume {self.path}` goes on with it.")
        if (self.path / "steps").exists():
            raise RunError(f"{self.path} holds steps of a run that has lost its config.toml. Choose another folder.")
        write_json(self.path / "provenance.json", self.provenance | {"schema": SCHEMA})
        write_json(self.path / "scenario.json", self.scenario)
        write_bytes(self.path / "config.toml", self.config.to_toml().encode())

    def step_folder(self, index: int) -> Path:
        return self.path / "steps" / f"{index:02d}"

    def finish_step(self, index: int, matrices: dict[str, np.ndarray], numbers: dict[str, Any]) -> None:
        """Write matrices, then the record with the checksums of every file of the step: the step is finished."""
        folder = self.step_folder(index)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **matrices)  # type: ignore[arg-type]
        write_bytes(folder / "matrices.npz", buffer.getvalue())
        for rest in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            rest.unlink(missing_ok=True)
        self.write_record(index, numbers)

    def write_record(self, index: int, numbers: dict[str, Any]) -> None:
        """Write the record of a step whose files lie there, with their checksums and its own digest."""
        folder = self.step_folder(index)
        sums = {p.name: sha256(p) for p in sorted(folder.glob("*")) if p.is_file() and p.name != "record.json"}
        run_sums = {name: sha256(self.path / name) for name in RUN_FILES if (self.path / name).is_file()}
        content = {"schema": SCHEMA, "step": index, "sha256": sums, "run_sha256": run_sums, **numbers}
        write_json(folder / "record.json", content | {"digest": content_digest(content)})

    @property
    def num_steps(self) -> int:
        return len(self.scenario["steps"])

    def records(self) -> list[StepRecord]:
        """Finished steps, in order, up to the first unfinished one."""
        found = []
        for index in range(self.num_steps):
            folder = self.step_folder(index)
            if not (folder / "record.json").exists():
                break
            content = read_json(folder / "record.json")
            if not isinstance(content, dict) or not isinstance(content.get("sha256"), dict):
                raise RunError(f"{folder / 'record.json'} is damaged: it lists no checksums. Remove {folder}.")
            found.append(StepRecord(index, content, folder))
        return found

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the records of the finished steps, which hold the checksums of their files."""
        return content_digest({"records": [content_digest(record.content) for record in self.records()]})

    def weights(self, index: int) -> tuple[StepRecord, Path]:
        """A finished step and its weights, checked against their checksum. Raises RunError where there are none."""
        records = self.records()
        if index >= len(records):
            raise RunError(f"{self.path} has not finished step {index}. `cssbench resume {self.path}` goes on with it.")
        record, name = records[index], "model.safetensors"
        if name not in record.content["sha256"]:
            origin = self.provenance.get("evaluated_from")
            remedy = f"Name {origin['path']}, whose weights it evaluated" if origin else "Name a run that was trained"
            raise RunError(f"{self.path} holds no weights. {remedy}.")
        if not (record.folder / name).exists():
            raise RunError(f"{record.folder / name} is missing: the weights were left out. Name the folder with them.")
        self.verify(record, name)
        return record, record.folder / name

    def verify(self, record: StepRecord, *names: str) -> None:
        """Raises RunError when a file of a step is missing or does not match its recorded SHA-256."""
        for name in names or tuple(record.content["sha256"]):
            path = record.folder / safe_name(name)
            if not path.exists() or sha256(path) != record.content["sha256"].get(name):
                raise RunError(
                    f"{path} is missing or does not match its checksum: it was changed or cut short after it was "
                    f"written. Remove {record.folder} to train that step again, or restore the file."
                )

    @property
    def finished(self) -> bool:
        return len(self.records()) == self.num_steps

    @property
    def groups(self) -> list[list[int]]:
        """Class ids of each step."""
        return [step["new"] for step in self.scenario["steps"]]
