"""Where a number comes from: command, code, packages, hardware, data. Plain data for `provenance.json`."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cssbench

PACKAGES = ("torch", "torchvision", "timm", "lightning", "numpy", "pillow", "safetensors", "pydantic")


def collect(command: list[str]) -> dict[str, Any]:
    """What holds for any run on this machine now."""
    return {
        "command": command,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": cssbench.__version__,
        **code_state(Path(cssbench.__file__).parent),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "hardware": hardware(),
    }


def code_state(folder: Path) -> dict[str, Any]:
    """{"commit", "dirty"} of the checkout that holds the code; None where it is installed without one."""
    try:
        top = _git(folder, "rev-parse", "--show-toplevel")
        if Path(top) != folder.parent.resolve():  # site-packages below somebody's own repository
            return {"commit": None, "dirty": None}
        return {"commit": _git(folder, "rev-parse", "HEAD"), "dirty": bool(_git(folder, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def _git(folder: Path, *words: str) -> str:
    run = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=20)
    return run.stdout.strip()


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """CPU model, usable cores, memory (GiB), GPUs."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpu": gpus,
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """The processor as the system calls it, or "unknown"."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def this_command() -> list[str]:
    """The command line as typed, the program by its name."""
    return [Path(sys.argv[0]).name if sys.argv else "python", *sys.argv[1:]]
