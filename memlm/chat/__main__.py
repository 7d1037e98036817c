"""`python -m memlm.chat`."""

import sys

from memlm.chat.main import main

if __name__ == "__main__":
    sys.exit(main())
