"""Text of strangers, from files and packages, for a terminal."""

from __future__ import annotations


def plain(text: object) -> str:
    """In one line, without control characters: what strangers wrote is no command to the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def plain_lines(text: str) -> str:
    """As `plain`, but lines and their indentation stay."""
    return "\n".join("".join(c if c.isprintable() else " " for c in line) for line in text.split("\n"))
