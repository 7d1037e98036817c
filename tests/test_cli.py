"""What the entry points share."""

import subprocess
import sys

CODE = """
import sys
from memlm.cli import run_entry_point
sys.exit(run_entry_point(lambda: [print("a line") for _ in range(100_000)] and None))
"""


def test_a_reader_that_has_seen_enough_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"a line\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141
