"""Finished base steps by what determines them: runs with the same base step train it once (`--shared`, docs/shared.md).

DIR/<key[:2]>/<key>/       an entry; the key is the SHA-256 of `base_facts` as canonical JSON
  key.json                 the facts
  model.safetensors        weights right after training, before `Method.end_step`, which every run does itself
  method.safetensors       only of a method that is not `plain_base`: its state; the weights are then of after
                           `end_step`, and both come back as `cssbench resume` would bring them
  numbers.json             loss, seconds, who trained it; the SHA-256 of the files above
  evaluated-<digest>.npz   matrices, sample predictions and depths, by the weights and settings that gave them; beside
                           it, as JSON, those facts and the numbers of the record (tokens, GFLOPs)
DIR/<key[:2]>/<key>.lock   held while a process trains the entry; the kernel lets go of it when that process dies
"""

from __future__ import annotations

import io
import os
import shutil
from contextlib import suppress
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np

from cssbench import checkpoint, provenance
from cssbench.base_facts import base_facts, evaluation_facts, is_plain
from cssbench.errors import RunError
from cssbench.experiment import Experiment
from cssbench.lock import FileLock
from cssbench.method import StepContext
from cssbench.models.segmenter import Segmenter
from cssbench.progress import say
from cssbench.results import content_digest, read_json, safe_name, sha256, write_bytes, write_json
from cssbench.step_evaluation import Evaluated

POLL = 0.5  # seconds between two looks at a lock that another process holds


class BaseStep:
    """The base step of one run in the store `root`; without a `root` every method does nothing and returns None.

    `load`, or else `keep`; then `evaluation`, or else `keep_evaluation`. All processes of a distributed run call them;
    only the first touches the store. Leaving the context lets go of the lock.
    """

    def __init__(self, made: Experiment, root: Path | None):
        self.made, self.root, self.fabric = made, root, made.fabric
        self.plain = is_plain(made.method)
        self.reused: dict[str, Any] = {}  # numbers of the entry that was taken up
        self.lock: FileLock | None = None

    def __enter__(self) -> BaseStep:
        return self

    def __exit__(self, *error: object) -> None:
        if self.lock:
            self.lock.release()

    @property
    def record(self) -> dict[str, Any]:
        """What the step's record says of it: nothing, or where it comes from."""
        return {"shared": {n: self.reused[n] for n in ("key", "commit", "run", "when")}} if self.reused else {}

    @property
    def origin(self) -> str:
        """Words for the line of news: nothing, or "shared (trained by RUN at COMMIT), "."""
        found = self.reused
        commit = (found.get("commit") or "")[:12] or f"cssbench {found.get('version')}"
        return f"shared (trained by {found['run']} at {commit}), " if found else ""

    def load(self, ctx: StepContext, iterations: int) -> dict[str, Any]:
        """Numbers of the entry, its weights loaded as if just trained. Empty: there is none; train, then `keep`.

        Waits while another process trains the entry. Raises ConfigError when the store cannot be written.
        """
        if self.root is None:
            return {}
        first = self.fabric.is_global_zero
        if first:
            self.facts = base_facts(self.made)
            self.key = content_digest(self.facts)
            self.path = self.root / self.key[:2] / self.key
            self.lock = FileLock(self.path.with_name(f"{self.key}.lock"))
        told = not first
        while not self.fabric.broadcast(self.lock is not None and self.lock.acquire()):  # short: collectives time out
            if not told:
                say(f"step 0: another process trains this base step for {self.root}; waiting for it")
            told = True
            sleep(POLL)
        self.reused = self.fabric.broadcast(self._read() if first else {})
        if self.reused:
            self._restore(ctx.model)
            ctx.model.train()
            ctx.iteration = iterations
            self.__exit__()
        return self.reused

    def _read(self) -> dict[str, Any]:
        """Numbers of a whole entry, else {}; a damaged one is removed."""
        if not self.path.exists():
            return {}
        try:
            numbers = read_json(self.path / "numbers.json")
            sums = all(sha256(self.path / safe_name(name)) == recorded for name, recorded in numbers["sha256"].items())
            if sums and numbers["digest"] == content_digest(numbers) and numbers["key"] == self.key:
                return numbers
        except (RunError, OSError, KeyError, TypeError, AttributeError):
            pass
        say(f"step 0: the shared base step {self.path} is damaged; it is trained again and replaced")
        shutil.rmtree(self.path, ignore_errors=True)
        return {}

    def _restore(self, model: Segmenter) -> None:
        state: dict[str, Any] = {}
        if self.fabric.is_global_zero:
            checkpoint.load_weights(self.path / "model.safetensors", model)
            state = {} if self.plain else checkpoint.load_state(self.path / "method.safetensors")
        if self.fabric.world_size > 1:
            for tensor in model.state_dict().values():
                tensor.copy_(self.fabric.broadcast(tensor.cpu()))
        if not self.plain:
            self.made.method.load_state_dict(self.fabric.broadcast(state))

    def keep(self, loss: dict[str, float], iterations: int, seconds: float) -> None:
        """Store what was just trained, in `seconds`. A store that cannot be written costs the run nothing."""
        if self.root is None or not self.fabric.is_global_zero:
            return
        temporary = self.path.with_name(f".{self.key}.{os.getpid()}.tmp")
        try:
            for rest in self.path.parent.glob(f".{self.key}.*.tmp"):  # of a process that was killed while it wrote
                shutil.rmtree(rest)
            self._write(temporary, {"loss": loss, "iterations": iterations, "seconds": round(seconds, 3)})
            publish(temporary, self.path)
        except (OSError, RunError) as error:
            say(f"step 0: not stored in {self.root}: {error}")
        self.__exit__()

    def _write(self, folder: Path, numbers: dict[str, Any]) -> None:
        checkpoint.save_weights(folder / "model.safetensors", self.made.model)
        write_json(folder / "key.json", self.facts)
        if not self.plain:
            checkpoint.save_state(folder / "method.safetensors", self.made.method.state_dict())
        found = provenance.collect(provenance.this_command())
        who = {name: found[name] for name in ("command", "version", "commit", "dirty", "hardware")}
        content = numbers | who | {"key": self.key, "run": self.made.folder.name, "when": found["started"]}
        content |= {"sha256": {path.name: sha256(path) for path in sorted(folder.iterdir())}}
        write_json(folder / "numbers.json", content | {"digest": content_digest(content)})

    def evaluation(self) -> Evaluated | None:
        """What `evaluate_step` gave for these weights and settings (empty on other processes), or None."""
        if self.root is None:
            return None
        found = None
        if self.fabric.is_global_zero:
            self.about = evaluation_facts(self.made)
            self.evaluated = self.path / f"evaluated-{content_digest(self.about)}.json"
            found = self._read_evaluation() if self.evaluated.exists() else None
        return (found or Evaluated({})) if self.fabric.broadcast(found is not None) else None

    def _read_evaluation(self) -> Evaluated | None:
        try:
            about, path = read_json(self.evaluated), self.evaluated.with_suffix(".npz")
            if about["digest"] == content_digest(about) and about["sha256"] == sha256(path):
                with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                    arrays = {name: file[name] for name in file.files}
                parts: dict[str, dict[str, Any]] = {"m": {}, "s": {}, "d": {}}
                for name, array in arrays.items():
                    kind, _, key = name.partition(".")
                    parts[kind][key if kind == "m" else self.made.sample_stems[int(key)]] = array
                return Evaluated(parts["m"], parts["s"], parts["d"], about["numbers"], about["seconds"])
        except (RunError, OSError, KeyError, TypeError, AttributeError):
            pass
        say(f"step 0: {self.evaluated} or its matrices are damaged; the images are evaluated again")
        return None

    def keep_evaluation(self, found: Evaluated) -> None:
        """Store what `evaluate_step` returned."""
        if self.root is not None and self.fabric.is_global_zero and self.path.is_dir():
            arrays = {f"m.{key}": matrix for key, matrix in found.matrices.items()}
            for kind, pictures in (("s", found.samples), ("d", found.depths)):
                arrays |= {f"{kind}.{self.made.sample_stems.index(stem)}": ids for stem, ids in pictures.items()}
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
            with suppress(RunError):  # as in `keep`
                write_bytes(self.evaluated.with_suffix(".npz"), buffer.getvalue())
                about = self.about | {"seconds": found.seconds, "numbers": found.numbers}
                about |= {"sha256": sha256(self.evaluated.with_suffix(".npz"))}
                write_json(self.evaluated, about | {"digest": content_digest(about)})


def publish(temporary: Path, target: Path) -> None:
    """Rename one folder onto the other; where another process was first, its copy stays."""
    try:
        os.rename(temporary, target)
    except OSError:
        shutil.rmtree(temporary)
        if not target.is_dir():
            raise
