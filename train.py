"""Train a language model with memory: python train.py --config configs/demo.yaml."""

import os
import sys

if __name__ == "__main__":
    # Read when torch is imported. By default its waiting threads spin for long: with other work on
    # the machine, training was measured to become 70 times slower; so it does not.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from memlm.training.main import main

    sys.exit(main())
