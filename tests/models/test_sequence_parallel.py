"""Rows that several processes hold together give what whole rows on one process give."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from memlm.errors import UserError
from memlm.layers.context import CallContext, SequenceLayout
from memlm.layers.convolution import ConvolutionState, ShortConvolution, carried_tail
from memlm.layers.sequence_group import SequenceGroup
from memlm.models.sequence import own_columns
from tests.memory.contract import GATED_DELTA, KNN_CACHE, LACT, MEMORIZING, TITANS, cases
from tests.memory.law_tools import ATTENTION, TOLERANCE, build_model
from tests.memory.processes import run_processes
from tests.models.sequence_worker import LENGTH, Case, compare, rows

SLIDING = {"type": "sliding_attention", "num_heads": 2}
ATTENTIONS = [
    # Of neighbours only, where no token is padding; of all; beyond the row; of all tokens.
    {"mixer": {**SLIDING, "window": 4, "conv_size": 4}, "ffn": None},
    {"mixer": {**SLIDING, "window": 11, "num_heads": 4, "num_key_value_heads": 2}},
    {"mixer": {**SLIDING, "window": 100}},
    {"mixer": {"type": "attention", "num_heads": 2, "conv_size": 3}},
]
NEURAL = [
    {"mixer": {"type": "titans", **TITANS, "depth": 1}},
    {"mixer": ATTENTION, "memory": {"type": "titans", **TITANS, "depth": 2}, "ffn": None},
]
STORES = [
    {"mixer": {"type": "memorizing_attention", **MEMORIZING}},
    {
        "repeat": 2,
        "mixer": {"type": "gated_delta", **GATED_DELTA},
        "memory": {"type": "knn_cache", **KNN_CACHE, "share": "store", "parallel": True},
    },
    {"mixer": ATTENTION, "memory": {"type": "lact", **LACT}},
]
CASES = [
    Case("attentions", ATTENTIONS, activations="recompute"),
    Case("neural", NEURAL, activations="recompute"),
    Case("neural off", NEURAL, use_memory=False),
    Case("neural in float32", NEURAL[:1], torch.float32),
    Case("stores", STORES),
]


def every_memory(memory: str, activations: str) -> list[Case]:
    """A memory, in each of its specs and sites; what normalises over a call needs whole ones."""
    return [
        Case(str(case), case.layers(), activations=activations)
        for case in cases()
        if case.memory == memory and case.spec.options.get("query_norm") != "batch"
    ]


def assert_equal(results: list[dict[str, dict[str, float]]], compared: list[Case]) -> None:
    """Raise AssertionError where a process found a difference."""
    for case in compared:
        for rank, found in enumerate(results):
            limits = dict.fromkeys(found[case.name], TOLERANCE[case.dtype]) | {"states": 0.0}
            limits["loss"] = TOLERANCE[torch.float32]  # transformers' own is float32
            wrong = {
                what: error for what, error in found[case.name].items() if error > limits[what]
            }
            assert not wrong, f"{case.name}, process {rank}: {wrong}"


def test_two_processes_equal_one():
    *results, tails = zip(*run_processes(2, compare_all, CASES), strict=True)
    assert_equal(*results, CASES)
    assert max(tails) < TOLERANCE[torch.float64]


@pytest.mark.slow
def test_four_processes_equal_one():
    *results, tails = zip(*run_processes(4, compare_all, CASES), strict=True)
    assert_equal(*results, CASES)
    assert max(tails) < TOLERANCE[torch.float64]


@pytest.mark.slow
def test_two_groups_of_two_processes():
    assert_equal(run_processes(4, compare, CASES, 2), CASES)


@pytest.mark.slow
@pytest.mark.parametrize("memory", sorted({case.memory for case in cases()} - {"neural_cache"}))
@pytest.mark.parametrize(("processes", "activations"), ((2, "keep"), (4, "recompute")))
def test_every_memory(processes: int, activations: str, memory: str):
    compared = every_memory(memory, activations)
    assert_equal(run_processes(processes, compare, compared), compared)


@pytest.mark.slow
@pytest.mark.parametrize("activations", ("selective", "offload", "recompute_offload"))
def test_what_blocks_keep(activations: str):
    compared = [dataclasses.replace(case, activations=activations) for case in CASES]
    assert_equal(run_processes(2, compare, compared), compared)


def compare_all(compared: list[Case]) -> tuple[dict[str, dict[str, float]], float]:
    """What a process finds: `compare`, and the differences of tails of short convolutions."""
    check_refusals()
    return compare(compared), max(tail_difference(seed) for seed in range(25))


def tail_difference(seed: int) -> float:
    """The largest difference, gradients included, of a short convolution over shared rows."""
    generator = torch.Generator().manual_seed(seed)
    B, T, C, k = 3, LENGTH // 2, 5, 4
    sequence = SequenceGroup(dist.group.WORLD)
    columns = sequence.columns(T)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    # Without padding, without borders, with both, and with rows that end or begin in padding.
    valid = random(B, T) > (0.5 if seed % 3 else -1)
    if seed % 5 == 0:
        valid[0], valid[1, : T - 2], valid[2, 1:] = False, False, False
    starts = random(B, T) > (0.8 if seed % 4 else 2)
    positions = torch.arange(T).expand(B, T)
    whole = CallContext(SequenceLayout.build(positions, valid, starts), positions)
    convolution = ShortConvolution(C, k).double()
    given = [random(B, T, C), random(B, k - 1, C)]
    upstream = random(B, T, C)

    def convolve(inputs: Tensor, tail: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        state = ConvolutionState(tail)
        y, last = convolution(layout.pack(inputs), layout.incoming(state).tail, layout)
        return layout.unpack(y), layout.outgoing(ConvolutionState(last), state).tail

    x, tail = (tensor.clone().requires_grad_() for tensor in given)
    expected, end = convolve(x, tail, whole.layout)
    (expected * upstream).sum().backward()
    own, own_tail = (tensor.clone().requires_grad_() for tensor in given)
    layout = own_columns(whole, sequence).layout
    carried = carried_tail(own[:, columns], own_tail, layout, sequence)
    found, own_end = convolve(own[:, columns], carried, layout)
    (found * upstream[:, columns]).sum().backward()
    pairs = [(expected[:, columns], found), (x.grad, own.grad), (tail.grad, own_tail.grad)]
    for _, gradient in pairs[1:]:
        dist.all_reduce(gradient)
    if sequence.is_last:
        pairs.append((end, own_end))
    return max((one - other).abs().max().item() for one, other in pairs)


def check_refusals() -> None:
    """What needs whole rows is refused in one line, before anything is sent."""
    model = Case("", ATTENTIONS).build().eval()
    model.set_sequence_group(SequenceGroup(dist.group.WORLD))
    call = rows(1)
    for message, arguments in {
        "rows of 3 tokens cannot be shared equally": {"input_ids": call["input_ids"][:, :3]},
        "write_memory=False": call | {"write_memory": False},
        "a cache": call | {"use_cache": True},
        "logits_to_keep": call | {"logits_to_keep": 1},
    }.items():
        with pytest.raises(UserError, match=message):
            model(**arguments)
    batch_norm = {"type": "product_key", "num_keys": 4, "top_k": 2, "query_norm": "batch"}
    model = Case("", [{"mixer": SLIDING | {"window": 4}, "ffn": batch_norm}]).build()
    with pytest.raises(UserError, match="query_norm"):
        model.set_sequence_group(SequenceGroup(dist.group.WORLD))
    model = build_model([{"mixer": SLIDING | {"window": 4}}], output={"type": "neural_cache"})
    with pytest.raises(UserError, match="an output memory"):
        model.set_sequence_group(SequenceGroup(dist.group.WORLD))
