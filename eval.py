"""Judge a model: python eval.py --model runs/demo --tasks needle,mqar,perplexity --output DIR."""

import os
import sys

if __name__ == "__main__":
    # Read when torch is imported. By default its waiting threads spin for long: with other work on
    # the machine, training was measured to become 70 times slower; so it does not.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from memlm.evaluation.main import main

    sys.exit(main())
