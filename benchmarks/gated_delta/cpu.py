"""One thread of the CPU against transformers' torch function."""

from typing import Any

import torch

from benchmarks import report
from benchmarks.gated_delta import measure
from benchmarks.gated_delta.decoding import decode
from benchmarks.gated_delta.peers import memlm_peers, transformers_peer
from benchmarks.gated_delta.problem import Problem
from benchmarks.library import one_thread, ratio, time_interleaved

BASE = "transformers"
HEADS, CHANNELS = 4, 64


def run(repeats: int, quick: bool) -> tuple[dict[str, Any], bool]:
    """Print the tables; all results, and whether outputs and gradients agree."""
    lengths = (128, 256, 512) if quick else (2048, 4096, 8192)
    contexts = (64, 1024) if quick else (64, 65536)
    with one_thread():
        peers = [*memlm_peers("cpu"), transformers_peer()]
        errors, agree = measure.agreement(_problem(lengths[0] // 4), peers)
        found = {
            "machine": report.machine(),
            "agreement": errors,
            "absent": measure.absent(peers),
            "lengths": _lengths(peers, lengths, repeats),
            "packed": _packed(peers, lengths[-1], repeats),
            "decoding": decode(_problem(1), contexts, repeats, "auto"),
        }
    return found, agree


def _problem(tokens: int, lengths: tuple[int, ...] = ()) -> Problem:
    return Problem(1, tokens, HEADS, HEADS, CHANNELS, CHANNELS, lengths=lengths)


def _lengths(peers: list, lengths: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    """Forward and backward at each length, and how it grows."""
    rows = []
    for tokens in lengths:
        runs = measure.runs(_problem(tokens), peers, backward=True)
        rows += [
            {"T": tokens, **row}
            for row in measure.compared(time_interleaved(runs, "cpu", repeats), BASE)
        ]
    header = [f"T={tokens} ms" for tokens in lengths]
    header += [f"T={tokens} over {BASE}" for tokens in lengths]
    header += [f"T={lengths[-1]} over T={lengths[0]}"]
    shown = []
    for name in dict.fromkeys(row["peer"] for row in rows):
        mine = [row for row in rows if row["peer"] == name]
        seconds = [row.get("seconds") for row in mine]
        growth = seconds[-1] / seconds[0] if seconds[-1] and seconds[0] else None
        cells = [x and 1000 * x for x in seconds] + [row.get("ratio") for row in mine]
        shown.append([name, *cells, growth])
    print(f"\nForward and backward, {_problem(lengths[0])} and longer, float32, 1 thread")
    print(report.table(["peer", *header], shown))
    measure.print_absent(peers)
    return rows


def _packed(peers: list, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Eight documents of random length in a row, against one document as long as the row."""
    generator = torch.Generator().manual_seed(0)
    cuts = (torch.randperm(tokens - 1, generator=generator)[:7] + 1).sort().values.tolist()
    lengths = tuple(b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True))
    own = [peer for peer in measure.present(peers, tokens) if peer.name.startswith("memlm")]
    runs = {
        f"{name}, {kind}": run
        for kind, problem in (("one", _problem(tokens)), ("packed", _problem(tokens, lengths)))
        for name, run in measure.runs(problem, own, backward=True).items()
    }
    times = time_interleaved(runs, "cpu", repeats)
    rows, base = [], f"over one document of {tokens}"
    for peer in own:
        one, packed = times[f"{peer.name}, one"], times[f"{peer.name}, packed"]
        row = {"peer": peer.name, "lengths": lengths, "one": one, "packed": packed}
        measured = isinstance(one, list) and isinstance(packed, list)
        rows.append(row | {"ratio": ratio(packed, one) if measured else None})
    print(f"\nForward and backward of {len(lengths)} packed documents of {lengths} tokens")
    print(report.table(("peer", base), [[row["peer"], row["ratio"]] for row in rows]))
    return rows
