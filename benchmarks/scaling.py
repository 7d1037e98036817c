"""The tables of docs/scaling.md, from the formulas of `memlm.memory.scaling` and of the planner.

python -m benchmarks.scaling
"""

from benchmarks import report
from memlm.config import TrainConfig
from memlm.memory.scaling import SharedTable
from memlm.training.plan import Cluster, find_gpu
from memlm.training.plan.traffic import traffic
from memlm.training.plan.weights import FLOAT, Table, Weight, Weights

TOKENS, WIDTH = 32768, 1024  # per process and layer; channels
SIZES = ((2**20, 1), (2**22, 4), (2**24, 8), (2**26, 32), (2**28, 128), (2**30, 512))
GIB, KIB = 2**30, 2**10
# Decoders of SwiGLU and attention over all heads: name, width, blocks, width of feed-forward.
MODELS = (
    ("100M", 640, 15, 1728),
    ("340M", 1024, 24, 2752),
    ("1.3B", 2048, 24, 5504),
    ("8B", 4096, 40, 11008),
)
SLOTS = (2**20, 2**22, 2**24, 2**26)
GPUS, TABLE_GPUS = (1, 8, 64), 8  # that a table is shared among where there are so many
VOCABULARY = 32000
ROW_TOKENS = 8192  # of a GPU and step


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


def decoder(width: int, blocks: int, inner: int) -> list[Weight]:
    """The matrices of a decoder whose head is its embedding."""
    shapes = {"attention": (4 * width, width), "ffn": (3 * inner, width)}
    matrices = [
        Weight(f"layers.{block}.{name}", shape, block, 2, True)
        for block in range(blocks)
        for name, shape in shapes.items()
    ]
    return [Weight("embedding", (VOCABULARY, width), None, 2, True), *matrices]


def model_table() -> str:
    """Bytes of a GPU and messages of a step, for 100M to 8B parameters and 1M to 64M slots."""
    gpu = find_gpu("h200")
    header = ["parameters", "slots", "GiB on 1 GPU", "on 8", "on 64", "messages of 64, GB", "ms"]
    rows = []
    for name, *sizes in MODELS:
        for slots in SLOTS:
            held = []
            for processes in GPUS:
                together = min(processes, TABLE_GPUS)
                shared = SharedTable(slots, sizes[0], together)
                table = Table("table", shared, "lazy_adam", 1)
                weights = Weights(decoder(*sizes), [table])
                # A weight, its gradient and two moments; all of them in shards.
                dense = 4 * FLOAT * sum(w.shard(processes) for w in weights.dense)
                reads = table.waiting_bytes([ROW_TOKENS]) * (processes // together)
                held.append((dense + table.value_bytes + table.moment_bytes + reads) / GIB)
            options = TrainConfig(mixed_precision="bf16", memory_parallel=TABLE_GPUS)
            sent = traffic(weights, options, "fsdp2", GPUS[-1], [ROW_TOKENS])
            seconds = sum(item.seconds(Cluster(gpu, GPUS[-1])) for item in sent)
            gigabytes = sum(item.received for item in sent) / 1e9
            rows.append([name, f"{slots >> 20}M", *held, gigabytes, 1000 * seconds])
    return report.table(header, rows)


if __name__ == "__main__":
    print(scaling_table())
    print()
    print(model_table())
