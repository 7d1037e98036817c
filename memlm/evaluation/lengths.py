"""Lengths as people write them: 4096, 4k, 1M, 4k..64k."""

import re

from memlm.errors import UserError

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}
_NUMBER = re.compile(r"(\d{1,12})([kKmM]?)")


def parse_length(text: int | str, where: str) -> int:
    """Tokens of "4096", "4k" (4096) or "1M" (1,048,576).

    Raises:
        UserError: for anything else.
    """
    match = _NUMBER.fullmatch(str(text).strip())
    if match is None or not int(match[1]):
        raise UserError(f"{where}: {text!r} is no length; valid are 4096, 4k, 1M and 4k..64k")
    return int(match[1]) * _UNITS[match[2].lower()]


def parse_lengths(entries: list[int | str], where: str) -> list[int]:
    """Ascending lengths; "4k..64k" stands for 4k, 8k, 16k, 32k, 64k.

    Raises:
        UserError: for an empty list, an entry that is no length, or a range that ends below its
            start.
    """
    found = set()
    for entry in entries:
        first, dots, last = str(entry).partition("..")
        length = parse_length(first, where)
        found.add(length)
        if dots:
            end = parse_length(last, where)
            if end < length:
                raise UserError(f"{where}: the range {entry!r} ends below its start")
            while 2 * length <= end:
                length *= 2
                found.add(length)
            found.add(end)
    if not found:
        raise UserError(f"{where}: empty; give at least one length in tokens, such as 4k")
    return sorted(found)


def format_length(tokens: int) -> str:
    """1M, 64k or 500, as short as it is exact."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)
