"""Train a language model with memory: python train.py --config configs/demo.yaml."""

import os
import sys

if __name__ == "__main__":
    # Read when torch is imported: spinning threads slow a busy machine down by a factor of ten.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from memlm.training.main import main

    sys.exit(main())
