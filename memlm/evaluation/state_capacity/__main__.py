"""`python -m memlm.evaluation.state_capacity`."""

import sys

from memlm.evaluation.state_capacity.main import main

if __name__ == "__main__":
    sys.exit(main())
