"""`python -m memlm.evaluation.suite`."""

import sys

from memlm.evaluation.suite.main import main

if __name__ == "__main__":
    sys.exit(main())
