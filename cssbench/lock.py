"""A lock between processes that share a folder. The kernel lets go of it when its holder ends, however it ends."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import IO

from cssbench.errors import ConfigError


class FileLock:
    """A lock on `path`, a file that is made when it is missing and left where it is.

    shared: several may hold it at a time, but nobody while another holds it alone.
    """

    def __init__(self, path: Path, shared: bool = False):
        self.path, self.shared = path, shared
        self.file: IO[str] | None = None

    def acquire(self) -> bool:
        """Take the lock if nobody stands against it; whether it is held now. Raises ConfigError where none can be."""
        import fcntl  # here, because not every system has it

        try:
            if self.file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = self.path.open("a", encoding="utf-8")
            fcntl.flock(self.file, (fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be locked: {error.strerror or error}. Choose a folder that can be written, on a "
                f"file system that knows locks."
            ) from error
        return True

    def sign(self) -> None:
        """Write into the file which process holds the lock, for `holder`."""
        if self.file is not None:
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {platform.node()}")
            self.file.flush()

    @property
    def holder(self) -> str:
        """Who signed last, in words."""
        with suppress(OSError):
            return self.path.read_text(encoding="utf-8", errors="replace")[:200] or "another process"
        return "another process"

    def release(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
