"""Judge a model: python eval.py --model runs/demo --tasks needle,mqar,perplexity --output DIR."""

import sys

from memlm.evaluation.main import main

if __name__ == "__main__":
    sys.exit(main())
