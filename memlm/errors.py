"""The one exception that means "the user can fix this"."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A bad configuration, argument, data file or checkpoint.

    The message is one line that says what is wrong, where, and what would be valid. Entry points
    print it and exit with code 2.
    """


class SharedError(UserError):
    """A UserError that every process of a run raises: one of each machine prints it."""


class DivergedError(SharedError):
    """Training cannot go on: losses, gradients or a memory's weights are not finite."""


def nearest(name: str, options: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the option closest to `name`, or an empty string."""
    match = difflib.get_close_matches(str(name), list(options), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def require_known(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise UserError for the first key of `given` that is not in `known`."""
    known = list(known)
    for key in given:
        if key not in known:
            hint = nearest(key, known) or f" (valid: {', '.join(sorted(known)) or 'none'})"
            raise UserError(f"{where}: unknown key {key!r}{hint}")
