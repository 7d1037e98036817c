"""The table of docs/scaling.md, from the formulas of `memlm.memory.scaling`.

python -m benchmarks.scaling
"""

from benchmarks import report
from memlm.memory.scaling import SharedTable

TOKENS, WIDTH = 32768, 1024  # per process and layer; channels
SIZES = ((2**20, 1), (2**22, 4), (2**24, 8), (2**26, 32), (2**28, 128), (2**30, 512))
GIB, KIB = 2**30, 2**10


def scaling_table() -> str:
    """Memory of a process and bytes per token for 1M to 1B slots."""
    header = ("slots", "processes", "values + Adam GiB", "reads waiting GiB (columns)")
    header += ("KiB per token (columns)", "KiB per token (rows)")
    rows = []
    for slots, processes in SIZES:
        columns = SharedTable(slots, WIDTH, processes)
        by_rows = SharedTable(slots, WIDTH, processes, "rows")
        rows.append(
            [
                f"{slots >> 20}M",
                processes,
                columns.memory_bytes / GIB,
                columns.pending_bytes(TOKENS) / GIB,
                columns.bytes_per_token(TOKENS) / KIB,
                by_rows.bytes_per_token(TOKENS) / KIB,
            ]
        )
    return report.table(header, rows)


if __name__ == "__main__":
    print(scaling_table())
