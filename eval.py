"""Judge a model: python eval.py --model runs/demo --tasks needle,mqar,perplexity --output DIR."""

import os
import sys

if __name__ == "__main__":
    # Read when torch is imported: spinning threads slow a busy machine down by a factor of ten.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from memlm.evaluation.main import main

    sys.exit(main())
