"""Command line of the comparison; exit code 1 where results differ by more than rounding."""

import sys
from collections.abc import Sequence

from benchmarks.command import compare


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    return compare("retrieval", arguments)


if __name__ == "__main__":
    sys.exit(main())
