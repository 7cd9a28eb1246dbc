"""What `cssbench doctor` looks at: is this installation whole, on what does it run, what is missing, and what to do."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import cssbench
from cssbench import registry
from cssbench.errors import CssbenchError
from cssbench.progress import size_text

State = Literal["ok", "note", "broken"]
TIGHT = 5 * 2**30  # bytes on a disk below which a long run may not find room


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. state: `ok`; `note`, works with less than it could; `broken`, something required is
    not there. advice: what to do, empty where nothing is."""

    area: str
    name: str
    state: State
    found: str
    advice: str = ""


def examine() -> list[Check]:
    """Every check, in the order of `AREAS`. A check that itself fails is a finding, never an error."""
    found: list[Check] = []
    for area, look in AREAS.items():
        try:
            found += look()
        except Exception as error:  # whatever a damaged installation may raise
            said = registry.describe(error)
            found.append(Check(area, "this check", "broken", said, "Reinstall cssbench, or report it as a bug."))
    return found


def _python() -> Iterator[Check]:
    from cssbench.provenance import code_state

    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    advice = "" if fits else "cssbench is tested on Python 3.11 to 3.13: make an environment with one of them."
    state: State = "ok" if fits else "note" if sys.version_info[:2] > (3, 13) else "broken"
    yield Check("python", "Python", state, f"{platform.python_version()}, {sys.prefix}", advice)
    commit = code_state(Path(cssbench.__file__).parent)
    where = (
        f"commit {commit['commit'][:12]}{', with changes' * bool(commit['dirty'])}" if commit["commit"] else "installed"
    )
    yield Check("python", "cssbench", "ok", f"{cssbench.__version__}, {where}")


def tested_versions() -> dict[str, str]:
    """Package -> the version that was tested; empty where the list was not installed."""
    file = resources.files("cssbench") / "tested-versions.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    pins = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {_normal(name): number.strip() for name, number in pins}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _needs() -> tuple[list[str], dict[str, list[str]]]:
    """Required packages, and those of each extra, as the installed metadata name them."""
    required: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in requires("cssbench") or []:
        name = _normal(re.split(r"[\s<>=!~;\[(]", line, maxsplit=1)[0])
        extra = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", line)
        if extra is None:
            required.append(name)
        elif name != "cssbench":  # an extra of extras
            extras.setdefault(extra[1], []).append(name)
    return required, extras


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _packages() -> Iterator[Check]:
    tested = tested_versions()
    required, _ = _needs()
    others = []
    for name in required:
        number = _installed(name)
        if number is None:
            yield Check("packages", name, "broken", "not installed", f'Install it: pip install "{name}".')
        elif name in tested and number.split("+")[0] != tested[name]:
            others.append(f"{name} {number} (tested: {tested[name]})")
    if others:
        yield Check(
            "packages",
            "versions",
            "note",
            ", ".join(others),
            "Should something fail, or numbers differ, take the tested ones: pip install -c constraints.txt cssbench.",
        )
    count = sum(_installed(name) is not None for name in required)
    yield Check("packages", "required", "ok" if count == len(required) else "broken", f"{count} of {len(required)}")


def _extras() -> Iterator[Check]:
    _, extras = _needs()
    for extra, names in sorted(extras.items()):
        missing = [name for name in names if _installed(name) is None]
        if missing:
            found, advice = f"without {', '.join(missing)}", f'Only if you want it: pip install "cssbench[{extra}]".'
            yield Check("extras", extra, "note", found, advice)
        else:
            yield Check("extras", extra, "ok", ", ".join(f"{name} {_installed(name)}" for name in names))


def _devices() -> Iterator[Check]:
    import torch

    from cssbench.provenance import hardware

    here = hardware()
    memory = f", {here['memory_gib']} GiB" if here["memory_gib"] else ""
    yield Check("devices", "CPU", "ok", f"{here['cpu']}, {here['cores']} cores{memory}, {here['threads']} threads")
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        half = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16: use train.precision=16-mixed"
        yield Check("devices", f"GPU {number}", "ok", f"{facts.name}, {size_text(facts.total_memory)}, {half}")
    if torch.cuda.is_available():
        return
    built = torch.version.cuda is not None
    driver = shutil.which("nvidia-smi") is not None
    advice = "Recipes named camvid-, synthetic- and demo- are made for CPUs; those of ADE20K need a GPU."
    if driver and not built:
        advice = "There is an NVIDIA driver, but this PyTorch is built without CUDA: install one that is."
    elif driver:
        advice = "There is an NVIDIA driver, but PyTorch sees no GPU: is its version recent enough for this PyTorch?"
    yield Check("devices", "GPU", "note", "none that PyTorch can use", advice)


def _plugins() -> Iterator[Check]:
    from cssbench import protocol

    wrong: list[str] = []
    for group in registry.GROUPS:
        files = group in ("scenarios", "recipes", "presets", "suites")
        made: Any = registry.toml_catalogue(group) if files else registry.catalogue(group)
        wrong += protocol.catalogue().complaints if group == "protocols" else made.complaints
        wrong += [] if files else registry.missing_modules(group)
        parts = [] if group == "protocols" else registry.declared(group)[0]
        for part in parts:
            if part.distribution == registry.OWN:
                continue
            try:
                part.load()
                yield Check("plug-ins", f"{part.kind} {part.name}", "ok", f"from {part.distribution}")
            except CssbenchError as error:
                wrong.append(str(error))
    for message in dict.fromkeys(wrong):
        first, _, rest = message.partition(". ")
        yield Check("plug-ins", "a package that is not used", "note", first, rest)
    ours = sum(part.distribution == registry.OWN for group in registry.GROUPS for part in registry.declared(group)[0])
    yield Check("plug-ins", "parts of cssbench", "ok" if ours else "broken", str(ours), "" if ours else REINSTALL)


REINSTALL = "Reinstall cssbench: its entry points are missing (in a checkout: pip install -e .)."


def _data() -> Iterator[Check]:
    from cssbench.data.registry import make_dataset, root_variable

    set_here = 0
    for name in registry.parts("datasets"):
        variable = root_variable(name)
        root = os.environ.get(variable)
        if not root:
            continue
        set_here += 1
        try:
            source = make_dataset(name, root)
            counts = {split: len(source.stems(split)) for split in source.splits if source.has_images(split)}
            sizes = ", ".join(f"{count} {split}" for split, count in counts.items())
            yield Check("data", variable, "ok", f"{root}: {sizes}", f"`cssbench data verify {root}` opens every file.")
        except CssbenchError as error:
            yield Check("data", variable, "note", f"{root}: {error}", "Mend it, or unset the variable.")
    if not set_here:
        some = "CSSBENCH_DATA_ADE20K=/data/ADEChallengeData2016"
        yield Check(
            "data", "data roots", "note", "none set", f"Give --data with each command, or set {some} and the like."
        )


def _disk() -> Iterator[Check]:
    from cssbench.data.presence import cache_folder

    for name, folder in (("cache", cache_folder()), ("current folder", Path.cwd())):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        writable = os.access(there, os.W_OK)
        state: State = "ok" if writable and free > TIGHT else "note"
        advice = "" if free > TIGHT else "Make room, or work elsewhere: a run of a ViT-B on ADE20K keeps 0.4 GB a step."
        if not writable:
            advice = "It cannot be written: set CSSBENCH_CACHE." if name == "cache" else "Runs must be made elsewhere."
        yield Check("disk", name, state, f"{folder}: {size_text(free)} free", advice)


AREAS: dict[str, Callable[[], Iterator[Check]]] = {
    "python": _python,
    "packages": _packages,
    "extras": _extras,
    "devices": _devices,
    "plug-ins": _plugins,
    "data": _data,
    "disk": _disk,
}
