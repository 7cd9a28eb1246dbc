"""One large file over HTTP, in as many goes as it takes: what has arrived is kept and continued, never mixed."""

from __future__ import annotations

import errno
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cssbench
from cssbench.errors import DataError
from cssbench.progress import say, size_text

TIMEOUT = 60.0  # seconds without a byte
TRIES = 5  # attempts in a row that bring nothing
PAUSE = 2.0  # seconds before the second attempt, doubled for each later one
PIECE = 2**20
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
BROKEN = (urllib.error.URLError, http.client.HTTPException, OSError)


@dataclass(frozen=True)
class Origin:
    """What a partial file is part of. mark: the server's strong ETag, or the time of the last change; a file whose
    origin bears none is never continued. size: bytes of the whole; None where the server does not say."""

    url: str
    mark: str | None
    size: int | None


class Refused(Exception):
    """The server said no, for good."""


def download(url: str, target: Path, limit: int, room: Callable[[int, int], None] | None = None) -> None:
    """Fetch `url` into `target`, beside which `<name>.part` grows until it is whole.

    A `.part` of an earlier call is continued where the server can (Range) and its file has not changed (If-Range); else
    the file is begun again. limit: bytes it may have. room: called with the bytes that are to come and those of
    the whole before anything is stored.
    Raises DataError when it cannot be had; the part is kept then.
    """
    if not re.match("https?://[^/]", url):
        raise DataError(f"{url!r} cannot be fetched: expected an address that begins with http:// or https://.")
    part, tries, pause = target.with_name(f"{target.name}.part"), 0, PAUSE
    while True:
        before = _size(part)
        try:
            if _attempt(url, part, limit, room):
                break
            reason = "the connection ended early"
        except Refused as error:
            raise DataError(f"{url} cannot be fetched: {error}.") from None
        except BROKEN as error:
            if isinstance(error, OSError) and _is_local(error):
                raise DataError(
                    f"{part} cannot be written: {error.strerror}. Mend that, then fetch again: what has arrived is "
                    f"kept."
                ) from error
            reason = str(error)
        tries = 0 if _size(part) > before else tries + 1
        if tries >= TRIES:
            raise DataError(
                f"{url} cannot be fetched: {reason}. {size_text(_size(part))} have arrived and are kept: the same "
                f"command goes on from there."
            )
        say(f"{url}: {reason}; trying again")
        time.sleep(pause * 2 ** max(0, tries - 1))
    os.replace(part, target)
    _note(part).unlink(missing_ok=True)


def _is_local(error: OSError) -> bool:
    """Whether it is the disk's fault, not the connection's."""
    return not isinstance(error, urllib.error.URLError) and (error.errno in DISK or error.filename is not None)


def _attempt(url: str, part: Path, limit: int, room: Callable[[int, int], None] | None) -> bool:
    """One request; whether the file is whole now. Raises Refused, DataError and what a broken connection raises."""
    have, known = _size(part), _read_note(part)
    headers = {"User-Agent": f"cssbench/{cssbench.__version__}", "Accept-Encoding": "identity"}
    if have and known and known.url == url and known.mark:
        if have == known.size:
            return True
        headers |= {"Range": f"bytes={have}-", "If-Range": known.mark}
    try:
        answer = _opener().open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:  # what is here is no beginning of what is there
                _forget(part)
                return False
            if error.code >= 500 or error.code in (408, 429):
                raise
            raise Refused(f"the server answers {error.code} {error.reason}") from None
    with answer:
        origin = _origin(url, answer.headers)
        if answer.status == 206:
            start, whole = _range(answer.headers)
            if "Range" not in headers or start != have or known is None or whole not in (None, known.size):
                _forget(part)
                return False
            origin = replace(known, size=known.size or whole)
        else:
            _forget(part)
            have = 0
        if (origin.size or 0) > limit:
            raise Refused(f"it has {size_text(origin.size or 0)}, expected at most {size_text(limit)}")
        if room and origin.size is not None:
            room(origin.size - have, origin.size)
        part.parent.mkdir(parents=True, exist_ok=True)
        _note(part).write_text(json.dumps(asdict(origin)), encoding="utf-8")
        have = _store(answer, part, have, origin, limit)
    return have == origin.size or (origin.size is None and have > 0)


def _store(answer: Any, part: Path, have: int, origin: Origin, limit: int) -> int:
    """Append what comes; bytes that are there now."""
    bound = min(limit, origin.size if origin.size is not None else limit)
    with part.open("ab") as file:
        tick = _progress(origin.size)
        while piece := answer.read(PIECE):
            have += len(piece)
            if have > bound:
                file.close()
                _forget(part)
                raise Refused(f"the server sends more than the {size_text(bound)} expected")
            file.write(piece)
            tick(have)
    return have


def _progress(size: int | None) -> Callable[[int], None]:
    """Says every tenth part of a large file."""
    told = 0

    def tick(have: int) -> None:
        nonlocal told
        if size and size > 100 * PIECE and (tenth := 10 * have // size) > told:
            told = tenth
            say(f"  {10 * tenth} % of {size_text(size)}")

    return tick


def _origin(url: str, headers: Any) -> Origin:
    tag, changed, length = headers.get("ETag"), headers.get("Last-Modified"), headers.get("Content-Length", "")
    strong = tag if tag and not tag.startswith("W/") else None
    return Origin(url, strong or changed, int(length) if length.isdecimal() else None)


def _range(headers: Any) -> tuple[int, int | None]:
    """(first byte, bytes of the whole) of a Content-Range; (-1, None) where it is not one."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", "").strip())
    if not match:
        return -1, None
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _opener() -> urllib.request.OpenerDirector:
    """HTTP and HTTPS, through the proxies of the environment, and redirections to such addresses. Nothing else: no
    address leads to a file of this machine."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _size(part: Path) -> int:
    try:
        return part.stat().st_size
    except OSError:
        return 0


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_note(part: Path) -> Origin | None:
    try:
        content = json.loads(_note(part).read_text(encoding="utf-8"))
        found = Origin(**content)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    sound = isinstance(found.url, str) and isinstance(found.mark, str | None) and isinstance(found.size, int | None)
    return found if sound and "\n" not in (found.mark or "") and "\r" not in (found.mark or "") else None


def _forget(part: Path) -> None:
    with suppress(FileNotFoundError):
        part.unlink()
    with suppress(FileNotFoundError):
        _note(part).unlink()
