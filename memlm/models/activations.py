"""What blocks keep for their backward passes."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import PreTrainedModel

from memlm.errors import UserError, require_known
from memlm.layers.attention import Attention
from memlm.layers.context import CallContext
from memlm.layers.saved_tensors import SMALLEST, SavedOnHost
from memlm.layers.state import MemoryState
from memlm.models.modeling import MemLMForCausalLM

KEEP = "keep"
# Products of matrices and attention, by name: which of them exist depends on torch's version.
_PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "linear",
    "_scaled_mm",
    "_grouped_mm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_flash_attention_forward",
    "_efficient_attention_forward",
)
# Ours that cost as little as a norm: they are run again.
_CHEAP = ("short_convolution",)
_OUR_OPERATORS = ("memlm", "flash_attn")

Blocks = Callable[..., Any]


def set_activations(
    model: PreTrainedModel, policy: str, smallest: int = SMALLEST
) -> SavedOnHost | None:
    """Choose what the blocks of a model keep for the backward pass while it is in training mode.

    Every policy gives the gradients, the states and the random numbers of `keep`; a block that runs
    a second time is told what the first time found in its call, and writes nowhere.

    Args:
        model: a `MemLMForCausalLM`, or a model of transformers with an attached memory.
        policy: keep = everything; recompute = the inputs of a block, which runs again (Chen et al.
            2016, arXiv 1604.06174); selective = what matrix products, attention and the recurrences
            of `memlm.cuda` gave (Korthikanti et al. 2022, arXiv 2205.05198), and only the rest of a
            block is computed again; offload = everything, in the CPU's memory; recompute_offload =
            the inputs of a block, in the CPU's memory.
        smallest: bytes from which on a tensor is offloaded.

    Returns:
        What holds offloaded tensors; None for the other policies.

    Raises:
        UserError: for an unknown policy, or a model whose layers cannot run apart.
    """
    require_known([policy], [KEEP, *_POLICIES], "activations")
    if policy == KEEP:
        if model.supports_gradient_checkpointing:
            model._set_gradient_checkpointing(enable=False)
        return None
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"activations: the layers of a {type(model).__name__} cannot run again "
            "(supports_gradient_checkpointing is false); use keep"
        )
    run = _POLICIES[policy](model, smallest)
    # The method behind `activation_checkpointing_enable`, which has another name in transformers
    # before 5.20 and lets the embeddings ask for gradients also where a frozen model needs none.
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=run)
    return getattr(run, "host", None)


def set_blockwise(model: PreTrainedModel, tokens: int | None) -> None:
    """Let attention and feed-forward run over some tokens of a row at a time.

    Each block of tokens is computed again in the backward pass, so no mask, no scores and nothing
    of the intermediate size is there for a whole row (Liu and Abbeel 2023, arXiv 2305.19370).
    Results differ by the order of sums. Attention through a flash kernel, which has no mask, stays
    whole, and so do memories, which have chunks of their own.

    Args:
        model: a `MemLMForCausalLM`.
        tokens: of a block; None = whole rows.

    Raises:
        UserError: for a model whose attention and feed-forward are not of this library.
    """
    if tokens is None and not isinstance(model, MemLMForCausalLM):
        return
    if not isinstance(model, MemLMForCausalLM):
        raise UserError(
            f"blockwise_tokens: attention and feed-forward of a {type(model).__name__} are its "
            "own; leave it out (null), or train a model of this library"
        )
    for block in model.model.layers:
        feed_forward = [branch.module for branch in block.branches().values() if branch.stateless]
        attentions = [module for module in block.modules() if isinstance(module, Attention)]
        for module in feed_forward + attentions:
            if hasattr(module, "block_tokens"):
                module.block_tokens = tokens


def compile_blocks(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile every block where it is, by torch.compile; names of parameters stay as they are.

    Args:
        model: a `MemLMForCausalLM` whose blocks run once: with what `keep` or `offload` keep.
        backend: of torch.compile.

    Raises:
        UserError: for a model whose layers are not blocks of this library, or whose blocks run
            again: torch runs them uncompiled the second time, which saves other tensors.
    """
    if not isinstance(model, MemLMForCausalLM):
        raise UserError(
            f"compile: the layers of a {type(model).__name__} call its memory by hooks, which "
            "cannot be compiled with them; leave it out"
        )
    for block in model.model.layers:
        run = getattr(block, "_gradient_checkpointing_func", None)
        if block.gradient_checkpointing and type(run) is not _Offload:
            raise UserError("compile: blocks that run again are not compiled; use keep or offload")
        block.compile(backend=backend)


class _Recompute:
    """Keeps the inputs of a block."""

    def __init__(self, model: nn.Module, smallest: int):
        self.options: dict[str, Any] = {}

    def __call__(self, block: Blocks, *inputs: Any) -> Any:
        return checkpoint(_Repeatable(block, inputs), *inputs, use_reentrant=False, **self.options)


class _Selective(_Recompute):
    """Keeps what is expensive to compute again."""

    def __init__(self, model: nn.Module, smallest: int):
        super().__init__(model, smallest)
        self.options["context_fn"] = partial(create_selective_checkpoint_contexts, _saved_or_not)

    def __call__(self, block: Blocks, *inputs: Any) -> Any:
        return super().__call__(partial(_with_own_casts, block), *inputs)


class _Offload:
    """Keeps everything, in the CPU's memory."""

    def __init__(self, model: nn.Module, smallest: int):
        self.model, self.host = model, SavedOnHost(smallest)

    def __call__(self, block: Blocks, *inputs: Any) -> Any:
        device = next(value.device for value in inputs if isinstance(value, Tensor))
        with self.host.block(device, _plain_parameters(self.model)):
            return block(*inputs)


class _RecomputeOffload(_Offload):
    """Keeps the inputs of a block, in the CPU's memory: hidden states and states of memories."""

    def __call__(self, block: Blocks, *inputs: Any) -> Any:
        again = _Repeatable(block, inputs)
        tensors, outline = _flatten(inputs)

        def run(*tensors: Tensor) -> Any:
            return again(*_rebuild(outline, tensors))

        return super().__call__(partial(checkpoint, run, use_reentrant=False), *tensors)


_POLICIES: dict[str, type] = {
    "recompute": _Recompute,
    "selective": _Selective,
    "offload": _Offload,
    "recompute_offload": _RecomputeOffload,
}


class _Repeatable:
    """A block that finds the same each time it runs, whatever other blocks have shared since.

    What it shares itself the second time goes nowhere.
    """

    def __init__(self, block: Blocks, inputs: tuple):
        self.block, self.runs = block, 0
        self.shared = [dict(x.shared) if isinstance(x, CallContext) else None for x in inputs]

    def __call__(self, *inputs: Any) -> Any:
        self.runs += 1
        if self.runs > 1:
            inputs = tuple(
                value if shared is None else dataclasses.replace(value, shared=dict(shared))
                for value, shared in zip(inputs, self.shared, strict=True)
            )
        return self.block(*inputs)


def _with_own_casts(block: Blocks, *inputs: Any) -> Any:
    """A block whose operators are the same each time: weights that autocast has from a call before
    would be cast in the second run alone."""
    torch.clear_autocast_cache()
    return block(*inputs)


def _plain_parameters(model: nn.Module) -> Any:
    """Parameters and buffers; those that FSDP2 has not gathered have no storage of their own."""
    for tensors in (model.parameters(), model.buffers()):
        yield from (tensor for tensor in tensors if type(tensor) in (Tensor, nn.Parameter))


def _saved_or_not(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if isinstance(operator, torch._ops.OpOverload):
        namespace, _, name = operator._schema.name.partition("::")
        if namespace in _OUR_OPERATORS and name not in _CHEAP:
            return CheckpointPolicy.MUST_SAVE
        # Inside of an autograd.Function, and of searches, nothing is recorded: what they compute on
        # the way is theirs, and is not kept without checkpointing either.
        if namespace == "aten" and name in _PRODUCTS and torch.is_grad_enabled():
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _flatten(inputs: tuple) -> tuple[list[Tensor], list[Any]]:
    """The tensors among inputs and in states among them, and what is left in their places."""
    tensors: list[Tensor] = []

    def take(tensor: Tensor) -> _Place:
        tensors.append(tensor)
        return _Place(len(tensors) - 1)

    def outline(value: Any) -> Any:
        if isinstance(value, Tensor):
            return take(value)
        if isinstance(value, MemoryState):
            return _StateOutline(
                type(value), {name: take(tensor) for name, tensor in value.tensors().items()}
            )
        if isinstance(value, dict):
            return {key: outline(item) for key, item in value.items()}
        return value

    return tensors, [outline(value) for value in inputs]


def _rebuild(outline: list[Any], tensors: tuple[Tensor, ...]) -> list[Any]:
    def build(value: Any) -> Any:
        if isinstance(value, _Place):
            return tensors[value]
        if isinstance(value, _StateOutline):
            return value.kind.from_state_dict(build(value.fields))
        if isinstance(value, dict):
            return {key: build(item) for key, item in value.items()}
        return value

    return [build(value) for value in outline]


class _Place(int):
    """Where a tensor lies in a list of them."""


class _StateOutline:
    """A state without its tensors."""

    def __init__(self, kind: type[MemoryState], fields: dict[str, _Place]):
        self.kind, self.fields = kind, fields
