"""What every process does in test_sequence_parallel.py."""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from memlm import MemLMForCausalLM
from memlm.layers.sequence_group import SequenceGroup
from memlm.models.activations import set_activations
from tests.memory.law_tools import VOCABULARY, build_model

ROWS, LENGTH, CALLS = 3, 16, 3


@dataclasses.dataclass(frozen=True)
class Case:
    """A model that whole rows and shared rows go through.

    Attributes:
        name: of the case.
        layers: of the config.
        dtype: of the weights.
        activations: what blocks keep for the backward pass (`set_activations`).
        use_memory: as in a call of the model.
    """

    name: str
    layers: list[dict[str, Any]]
    dtype: torch.dtype = torch.float64
    activations: str = "keep"
    use_memory: bool = True

    def build(self) -> MemLMForCausalLM:
        model = build_model(self.layers, self.dtype)
        set_activations(model, self.activations)
        return model.train()


def rows(call: int) -> dict[str, Tensor]:
    """Calls each of which continues the rows of the one before.

    In the first, row 0 is one document, row 1 has borders within the columns of a process and where
    those of another begin, row 2 is padded at both ends. In the second no token is padding. In the
    third, all tokens in the columns of a process are padding, and a row has none at all.

    No token comes twice in a row within two calls. Two keys of the same token would be equally
    near to a query, and where one of them was stored by an earlier call, which takes no gradient,
    rounding would decide which gradients there are.
    """
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(VOCABULARY - 1, generator=generator) + 1 for _ in range(ROWS)]
    tokens = torch.stack(orders)[:, call % 2 * LENGTH :][:, :LENGTH]
    segments = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    if call == 0:
        segments[1] = torch.tensor([1] * 3 + [2] * 5 + [3] * 1 + [4] * 4 + [5] * 3)
        segments[2] = torch.tensor([0] * 5 + [1] * 4 + [2] * 2 + [0] * 5)
    elif call == 1:
        segments[1] = torch.tensor([1] * 8 + [2] * 5 + [3] * 3)
    else:
        segments[:, 8:] = 0
        segments[1] = 0
        segments[2, 7] = 2
    return {
        "input_ids": tokens,
        "segment_ids": segments,
        "labels": torch.where(segments > 0, tokens, -100),
    }


def run(model: MemLMForCausalLM, use_memory: bool) -> list[dict[str, Any]]:
    """Logits, loss and gradients of the calls, each of which goes on from the one before."""
    results, states = [], None
    for call in range(CALLS):
        model.zero_grad(set_to_none=False)
        output = model(
            **rows(call),
            memory_states=states,
            return_memory_states=True,
            use_memory=use_memory,
            skip_logits=False,
        )
        output.loss.backward()
        states = {name: state.detach() for name, state in output.memory_states.items()}
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()
        }
        results.append(
            {"logits": output.logits.detach(), "loss": output.loss.detach(), "grads": gradients}
        )
    results[-1]["states"] = states
    return results


def differences(case: Case, sequence: SequenceGroup) -> dict[str, float]:
    """The largest differences between whole rows and rows that processes hold together.

    `states`: between those that the processes return.
    """
    model = case.build()
    expected = run(model, case.use_memory)
    model.set_sequence_group(sequence)
    found = run(model, case.use_memory)
    columns = sequence.columns(LENGTH)
    largest = {"logits": 0.0, "loss": 0.0, "gradients": 0.0, "states": 0.0}

    def note(what: str, one: Tensor, other: Tensor) -> None:
        if one.numel():
            largest[what] = max(largest[what], (one.double() - other.double()).abs().max().item())

    for call, (one, other) in enumerate(zip(expected, found, strict=True)):
        valid = rows(call)["segment_ids"][:, columns] > 0
        if valid.any():
            note("logits", one["logits"][:, columns][valid], other["logits"][valid])
        summed = [other["loss"], *other["grads"].values()]
        for tensor in summed:
            dist.all_reduce(tensor, group=sequence.group)
        note("loss", one["loss"], summed[0])
        for before, after in zip(one["grads"].values(), summed[1:], strict=True):
            note("gradients", before, after)
    for state in found[-1]["states"].values():
        for tensor in state.tensors().values():
            first = tensor.contiguous().clone()
            dist.broadcast(first, group=sequence.group, group_src=0)
            note("states", first, tensor)
    return largest


def compare(cases: list[Case], groups: int = 1) -> dict[str, dict[str, float]]:
    """`differences` of every case, in so many groups of processes that each hold all rows."""
    size = dist.get_world_size() // groups
    all_groups = [dist.new_group(range(i * size, (i + 1) * size)) for i in range(groups)]
    sequence = SequenceGroup(all_groups[dist.get_rank() // size])
    return {case.name: differences(case, sequence) for case in cases}
