"""Label maps in MATLAB's MAT-files of level 5, as its `save` writes them (-v6, -v7): one numeric matrix, by name.

Source: "MAT-File Format", MathWorks, chapter 1. Read are real, full matrices of numbers; what else a file holds is
skipped, and nothing in it is run.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cssbench.errors import DataError

HEADER = 128
MATRIX, COMPRESSED = 14, 15
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
NUMERIC_CLASSES = range(6, 16)  # mxDOUBLE_CLASS to mxUINT64_CLASS
COMPLEX = 0x800
LARGEST = 2**28  # bytes that one variable may unpack to


class _FormatError(Exception):
    """What is wrong with a file, in words."""


def read_matrix(path: Path, name: str) -> np.ndarray:
    """The 2-D matrix `name` of a file, (rows, columns), with the numbers as stored. Raises DataError."""
    try:
        content = path.read_bytes()
        return _find(content, name)
    except OSError as error:
        reason = error.strerror or str(error)
    except _FormatError as error:
        reason = str(error)
    except (struct.error, zlib.error, ValueError, KeyError, IndexError):
        reason = "it is damaged"
    raise DataError(f"The MAT-file {path} cannot be read ({reason}). Fetch that file again.") from None


def _find(content: bytes, name: str) -> np.ndarray:
    if content.startswith(b"MATLAB 7.3"):
        raise _FormatError("it is of version 7.3, which is HDF5; the official files are of version 5")
    mark = content[126:128]
    if mark not in (b"IM", b"MI"):
        raise _FormatError("it is not a MAT-file of version 5")
    order = "<" if mark == b"IM" else ">"
    names = []
    for kind, data in _elements(content, HEADER, order):
        if kind == COMPRESSED:
            unpacker = zlib.decompressobj()
            unpacked = unpacker.decompress(data, LARGEST)
            if unpacker.unconsumed_tail:
                raise _FormatError(f"a variable unpacks to more than {LARGEST} bytes")
            kind, data = next(_elements(unpacked, 0, order))
        if kind != MATRIX:
            continue
        parts = _elements(data, 0, order)
        flags = struct.unpack_from(f"{order}I", next(parts)[1])[0]
        shape, found = _numbers(next(parts), order), next(parts)[1].decode("ascii", "replace")
        names.append(found)
        if found == name:
            if flags & 0xFF not in NUMERIC_CLASSES or flags & COMPLEX or len(shape) != 2:
                raise _FormatError(f"its variable {name!r} is not a 2-D matrix of real numbers")
            return _numbers(next(parts), order).reshape(tuple(int(side) for side in shape), order="F")
    raise _FormatError(f"it has no variable {name!r}, only {', '.join(names) or 'none'}")


def _elements(content: bytes, start: int, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, data) of the elements from `start` on. One of up to four bytes has its length in the type's upper half."""
    while start + 8 <= len(content):
        kind, size = struct.unpack_from(f"{order}II", content, start)
        if kind >> 16:
            kind, size, data = kind & 0xFFFF, kind >> 16, start + 4
            after = start + 8
        else:
            data = start + 8
            after = data + size + (-size % 8 if kind != COMPRESSED else 0)
        if data + size > len(content):
            raise _FormatError("it is cut off")
        yield kind, content[data : data + size]
        start = after


def _numbers(element: tuple[int, bytes], order: str) -> np.ndarray:
    return np.frombuffer(element[1], f"{order}{NUMBERS[element[0]]}")
