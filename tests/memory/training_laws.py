"""Laws of gradients, precision and the implementations behind a memory."""

import copy
import os
from collections.abc import Callable
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from memlm import MemLMForCausalLM
from memlm.layers.context import CallContext
from memlm.memory.output_memory import OUTPUT
from tests.memory.law_tools import (
    LENGTH,
    VOCABULARY,
    Case,
    assert_close,
    assert_same_bits,
    build_model,
    draw_ids,
    memory_states,
    model_of,
    run,
    snapshot,
)


def reference(case: Case, data) -> None:
    """The reference implementation gives the eager one's logits and gradients."""
    model = copy.deepcopy(model_of(case))
    ids = draw_ids(data, 2)
    cut = data.draw(st.integers(1, LENGTH - 1), label="cut")
    results = {}
    for name in ("reference", "eager", "auto"):
        with mock.patch.dict(os.environ, MEMLM_KERNELS=name):
            model.zero_grad()
            first, states = run(model, ids[:, :cut])
            second, _ = run(model, ids[:, cut:], states)
            logits = torch.cat([first, second], 1)
            logits.square().mean().backward()
            gradients = {key: value.grad.clone() for key, value in parameters(model).items()}
            results[name] = (logits.detach(), gradients)
    for name in ("eager", "auto"):
        assert_close(results[name][0], results["reference"][0])
        for key, gradient in results[name][1].items():
            assert_close(gradient, results["reference"][1][key])


def parameters(model: MemLMForCausalLM) -> dict[str, Tensor]:
    """The parameters that took part in the last backward pass."""
    return {name: value for name, value in model.named_parameters() if value.grad is not None}


def gradient(case: Case, data) -> None:
    """Gradients of input, parameters and incoming state are those of finite differences."""
    if case.site == OUTPUT:
        _output_gradient(case, data)
        return
    site = "memory" if case.site == "parallel" else case.site
    model = build_model([{site: case.entry()}])
    # Vectors of their own: equal tokens would tie in a search, and a tie has no gradient.
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="vectors"))
    embedded = torch.randn(2, 11, 32, generator=generator, dtype=torch.float64)
    cut = data.draw(st.integers(1, 6), label="cut")
    with torch.no_grad():
        _, states = run(model, None, inputs_embeds=embedded[:, :cut])
    names = list(parameters_of_interest(model))
    carried = [
        (name, key)
        for name, state in states.items()
        for key, tensor in state.tensors().items()
        if tensor.is_floating_point() and key.split(".")[0] not in case.spec.without_gradient
    ]

    def forward(embedded: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights = dict(zip(names, tensors, strict=False))
        given = {name: state.tensors() for name, state in states.items()}
        for (name, key), tensor in zip(carried, tensors[len(names) :], strict=True):
            given[name] = {**given[name], key: tensor}
        given = {name: type(states[name]).from_state_dict(given[name]) for name in given}
        out = torch.func.functional_call(
            model, weights, kwargs={"inputs_embeds": embedded, "memory_states": given}
        )
        after = [out.memory_states[name].tensors()[key] for name, key in carried]
        return (out.logits, *(tensor for tensor in after if tensor.requires_grad))

    inputs = [
        embedded[:, cut:],
        *(parameters_of_interest(model)[name] for name in names),
        *(states[name].tensors()[key] for name, key in carried),
    ]
    assert_gradients(forward, inputs, generator)


def assert_gradients(
    forward: Callable[..., tuple[Tensor, ...]],
    inputs: list[Tensor],
    generator: torch.Generator,
    step: float = 1e-6,
) -> None:
    """Raise AssertionError unless the gradient of every input is that of finite differences.

    Along one random direction per input, of all outputs together, randomly weighted: what
    `torch.autograd.gradcheck` does in its fast mode for every pair of them.
    """

    def like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = forward(*inputs)
    weights = [like(output) for output in outputs]

    def total(outputs: tuple[Tensor, ...]) -> Tensor:
        return sum((one * weight).sum() for one, weight in zip(outputs, weights, strict=True))

    gradients = torch.autograd.grad(total(outputs), inputs, allow_unused=True)
    for index, (tensor, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        direction = like(tensor)
        direction /= direction.norm()
        totals = []
        for sign in (1, -1):
            moved = [*inputs[:index], tensor + sign * step * direction, *inputs[index + 1 :]]
            totals.append(total(forward(*moved)).item())
        expected = (totals[0] - totals[1]) / (2 * step)
        found = 0.0 if gradient is None else (gradient * direction).sum().item()
        assert abs(found - expected) <= 1e-6 + 1e-3 * abs(expected), f"input {index}"


def _output_gradient(case: Case, data) -> None:
    memory = model_of(case).output_memory
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="vectors"))
    ids = draw_ids(data, 2, 11)
    cut = data.draw(st.integers(1, 6), label="cut")

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    before = CallContext.plain(2, cut, input_ids=ids[:, :cut])
    context = CallContext.plain(2, 11 - cut, cut, input_ids=ids[:, cut:])
    state = memory.init_state(2, dtype=torch.float64)
    _, state = memory(draw(2, cut, 32), draw(2, cut, VOCABULARY), state, before)
    carried = {key: value for key, value in state.tensors().items() if value.is_floating_point()}

    def forward(hidden: Tensor, logits: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = state.tensors() | dict(zip(carried, tensors, strict=True))
        mixed, after = memory(hidden, logits, type(state).from_state_dict(given), context)
        return (mixed, *(after.tensors()[key] for key in carried))

    inputs = [draw(2, 11 - cut, 32), draw(2, 11 - cut, VOCABULARY), *carried.values()]
    assert_gradients(forward, inputs, generator)


def parameters_of_interest(model: MemLMForCausalLM) -> dict[str, Tensor]:
    """All parameters behind the embedding."""
    return {name: value for name, value in model.named_parameters() if "embed_tokens" not in name}


def gradient_checkpointing(case: Case, data) -> None:
    """Checkpointing changes neither gradients nor states: nothing is written twice."""
    ids = draw_ids(data, 2)
    cut = data.draw(st.integers(1, LENGTH - 1), label="cut")
    results = []
    for enabled in (False, True):
        model = copy.deepcopy(model_of(case)).train()
        if enabled:
            model.gradient_checkpointing_enable()
        first, states = run(model, ids[:, :cut])
        carried = {name: state.detach() for name, state in states.items()}
        second, states = run(model, ids[:, cut:], carried)
        before = snapshot(states)
        (first.square().mean() + second.square().mean()).backward()
        assert_same_bits(states, before)
        gradients = {name: value.grad for name, value in parameters(model).items()}
        results.append((second, before, gradients))
    (plain, plain_states, plain_gradients), (logits, states, gradients) = results
    assert torch.equal(logits, plain)
    for name, tensors in states.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, plain_states[name][key]), f"{name}.{key} differs"
    assert gradients.keys() == plain_gradients.keys()
    for name, value in gradients.items():
        assert_close(value, plain_gradients[name])


def autocast(case: Case, data) -> None:
    """In bf16 autocast memories keep the dtypes of their states; every weight is reached."""
    model = model_of(case, torch.float32)
    model.zero_grad()
    ids = draw_ids(data, 2)
    cut = data.draw(st.integers(9, LENGTH - 1), label="cut")  # a store has filled by then
    with torch.autocast("cpu", torch.bfloat16):
        first, states = run(model, ids[:, :cut])
        second, states = run(model, ids[:, cut:], states)
        (first.float().square().mean() + second.float().square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
    before, after = (memory_states(model, x) for x in (model.init_states(2), states))
    for name, state in after.items():
        for key, tensor in state.tensors().items():
            assert tensor.dtype == before[name].tensors()[key].dtype, f"{name}.{key}"
