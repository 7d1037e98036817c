"""Command line of the comparison; exit code 1 where the functions differ."""

import sys
from collections.abc import Sequence

from benchmarks.command import compare


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    return compare("product_key", arguments, cpu_peer="product-key-memory")


if __name__ == "__main__":
    sys.exit(main())
