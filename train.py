"""Train a language model with memory: python train.py --config configs/demo.yaml."""

import sys

from memlm.training.main import main

if __name__ == "__main__":
    sys.exit(main())
