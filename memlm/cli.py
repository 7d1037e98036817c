"""What the entry points share."""

import sys
from collections.abc import Callable

from memlm.errors import UserError


def run_entry_point(function: Callable[[], int | None]) -> int:
    """Call `function` and return the exit code.

    A UserError prints `error: ...` on stderr and gives 2, Ctrl-C gives 130; other exceptions are
    bugs and keep their traceback.
    """
    try:
        return function() or 0
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
