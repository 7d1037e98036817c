"""Time per token of single-token calls, after a short and after a long context."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import report
from benchmarks.gated_delta.peers import Peer, forced, memlm_peer
from benchmarks.gated_delta.problem import Problem
from benchmarks.library import ratio, time_interleaved
from memlm import MemLMConfig, MemLMForCausalLM

PREFILL_PIECE = 4096  # tokens of a call


def decode(
    problem: Problem, contexts: tuple[int, int], repeats: int, implementation: str
) -> list[dict[str, Any]]:
    """Of the operation and of a small model, after `contexts` tokens; prints the table.

    problem: sizes of the operation; its T is not used. implementation: "auto" or the forced one.
    """
    stepping = {
        "operation": lambda tokens: _operation(problem, tokens, memlm_peer(implementation)),
        "model": lambda tokens: _model(problem.device, tokens),
    }
    with forced(implementation):
        rows = [
            _measure(name, make, contexts, problem.device, repeats)
            for name, make in stepping.items()
        ]
    columns = [f"us per token after {tokens}" for tokens in contexts]
    header = ("what", *columns, "ratio", "within 10 %")
    shown = [
        [row["what"], *(1e6 * x for x in row["seconds"]), row["ratio"], row["within"]]
        for row in rows
    ]
    print(f"\nDecoding, one token per call, memlm {implementation}")
    print(report.table(header, shown))
    return rows


def _measure(
    name: str,
    make: Callable[[int], Callable[[int], object]],
    contexts: tuple[int, int],
    device: str,
    repeats: int,
) -> dict[str, Any]:
    short, long = contexts
    with torch.no_grad():
        times = time_interleaved(
            {"short": make(short), "long": make(long)}, device, max(9, 3 * repeats)
        )
    found = ratio(times["long"], times["short"])
    return {
        "what": name,
        "contexts": contexts,
        "seconds": [statistics.median(times["short"]), statistics.median(times["long"])],
        "ratio": found,
        "within": "yes" if found.median <= 1.1 else "NO",
    }


def _operation(problem: Problem, tokens: int, peer: Peer) -> Callable[[int], object]:
    """One token after a context of `tokens`."""
    sizes = {"B": problem.B, "H": problem.H, "HV": problem.HV, "K": problem.K, "V": problem.V}
    kind = {"dtype": problem.dtype, "device": problem.device}
    _, state = peer.run(Problem(T=tokens, **sizes, **kind).tensors(grad=False))
    step = Problem(T=1, **sizes, **kind).tensors(grad=False)
    return lambda _: peer.run(step | {"initial_state": state})


def _model(device: str, tokens: int) -> Callable[[int], object]:
    """The same of a model with two gated delta layers, through its cache."""
    mixer = {"type": "gated_delta", "num_heads": 2, "head_dim": 24}
    config = MemLMConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        layers=[{"repeat": 2, "mixer": mixer, "ffn": "swiglu"}],
    )
    torch.manual_seed(0)
    model = MemLMForCausalLM(config).to(device).eval()
    ids = torch.randint(259, (1, tokens), device=device)
    cache = None
    for piece in ids.split(PREFILL_PIECE, 1):
        cache = model(piece, past_key_values=cache, use_cache=True).past_key_values
    last = ids[:, -1:]
    return lambda _: model(last, past_key_values=cache, use_cache=True)
