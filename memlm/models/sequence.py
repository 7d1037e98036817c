"""Calls of a model whose rows several processes hold together (sequence parallelism).

Every process is given the whole rows of small integers (tokens, masks, positions, labels) and the
states at their start; it finds the documents in them and runs its own columns.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from memlm.errors import UserError
from memlm.layers.context import CallContext, SequenceLayout
from memlm.layers.sequence_group import SequenceGroup
from memlm.memory.query_norm import QueryBatchNorm

IGNORED = -100


def own_columns(context: CallContext, sequence: SequenceGroup) -> CallContext:
    """What the layers are told of this process's columns, given the context of the whole rows.

    A first token that starts no document continues what comes from the process before.

    Raises:
        UserError: for rows that cannot be shared equally, and for a call that writes nothing.
    """
    if not context.write:
        raise UserError("sequence parallelism: write_memory=False needs whole rows on one process")
    columns = sequence.columns(context.layout.valid.shape[1])
    before = None
    if columns.start:
        before = _of_columns(context, slice(0, columns.start))
    own = _of_columns(context, columns)
    own.sequence, own.before = sequence, before
    own.dense = context.layout.num_tokens == context.layout.valid.numel()
    return own


def _of_columns(context: CallContext, columns: slice) -> CallContext:
    """A call of these columns of the rows alone, whose first tokens continue the ones before."""
    layout, positions = context.layout, context.position_ids[:, columns]
    # The number of a document is above all before it where one starts.
    earlier = F.pad(layout.document.cummax(1).values.clamp(min=0), (1, 0))[:, :-1]
    starts = layout.document > earlier
    part = SequenceLayout.build(positions, layout.valid[:, columns], starts[:, columns])
    part.may_jump = layout.may_jump
    return CallContext(
        part,
        positions,
        write=context.write,
        shared=context.shared,
        input_ids=None if context.input_ids is None else context.input_ids[:, columns],
    )


def refuse_model(model: nn.Module) -> None:
    """Raise UserError for a model whose function is not that of each row's earlier tokens."""
    if any(isinstance(module, QueryBatchNorm) for module in model.modules()):
        raise UserError(
            "sequence parallelism: product_key's query_norm: batch normalises over the tokens of "
            "one process; use layer or none"
        )


def refuse_call(keeps_cache: bool, logits_to_keep: int | Tensor, has_output_memory: bool) -> None:
    """Raise UserError for what needs whole rows on one process."""
    needs = {
        "a cache (use_cache, past_key_values, generate)": keeps_cache,
        "logits_to_keep": not isinstance(logits_to_keep, int) or logits_to_keep != 0,
        "an output memory": has_output_memory,
    }
    for what, used in needs.items():
        if used:
            raise UserError(f"sequence parallelism: {what} needs whole rows on one process")


def own_targets(
    labels: Tensor | None,
    shift_labels: Tensor | None,
    token_weights: Tensor | None,
    options: Mapping[str, Any],
    sequence: SequenceGroup,
) -> tuple[Tensor | None, dict[str, Any]]:
    """The targets of this process's columns, and the options of its loss.

    Args:
        labels: int64 [B, T] of whole rows, shifted here; or None.
        shift_labels: int64 [B, T / size], the targets of this process's columns, in place of them.
        token_weights, options: of the call. Without weights and a number of items the loss is
            divided by the targets of all processes, so that the sum of theirs is the mean.
        sequence: the processes.
    """
    ignored = options.get("ignore_index", IGNORED)
    if shift_labels is None and labels is not None:
        columns = sequence.columns(labels.shape[1])
        shift_labels = F.pad(labels[:, 1:], (0, 1), value=ignored)[:, columns].contiguous()
    options = dict(options)
    counted = token_weights is not None or options.get("num_items_in_batch") is not None
    if shift_labels is not None and not counted:
        items = (shift_labels != ignored).sum()
        dist.all_reduce(items, group=sequence.group)
        options["num_items_in_batch"] = items
    return shift_labels, options
