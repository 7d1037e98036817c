"""Two processes on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_two(*words: str | Path) -> str:
    """What a script and its arguments print when torchrun starts it twice.

    Raises:
        AssertionError: with what it wrote to stderr, when a process fails.
    """
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    done = subprocess.run(
        [*torchrun, "--nproc_per_node", "2", *map(str, words)],
        timeout=300,
        capture_output=True,
        text=True,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
