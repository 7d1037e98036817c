"""The ways a memory or a prompt is changed, to see what the memory is worth.

`on`        as trained.
`off`       every memory branch gives zero, from the first token on; one that contains attention
            goes on attending without its memory.
`reset`     the context is read with the memory; before the question the memories are as new.
`swapped`   before the question each row gets the memories of another row: another document's.
`zeroed`    for a memory without a state (a table of learned values): its values count as zero.
`changed`   the prompt holds another value in the same place: the answer has to follow.
`absent`    the prompt holds nothing to be found: the answer of `on` must not come.

Reset and swapped touch the memories only: attention tails and positions stay, so the text must be
further away than attention reaches for these two to show anything.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from memlm.evaluation.config import ALL_CONDITIONS
from memlm.layers.attention import Attention
from memlm.layers.state import MemoryState
from memlm.memory.output_memory import OutputMemory
from memlm.memory.value_table import zeroed_values
from memlm.models.attached import AttachedMixin

States = dict[str, MemoryState]


@dataclass(frozen=True)
class Pass:
    """One reading of the contexts.

    Attributes:
        conditions: asked on the states of this reading; the first one leaves them as they are.
        use_memory: False = memories give zero.
        ablation: a context in which the whole pass runs.
        variant: which prompt is read: "plain", "changed" or "absent".
    """

    conditions: tuple[str, ...]
    use_memory: bool = True
    ablation: Callable[[], AbstractContextManager] = nullcontext
    variant: str = "plain"


@dataclass(frozen=True)
class Plan:
    """Which conditions apply to a model.

    Attributes:
        passes: the readings that cover them.
        memory_names: the memory states by name; empty for a model whose memories have none.
        attention_reach: tokens that attention looks back through all layers; None = everything.
        notes: what a reader has to know about conditions that do not apply or show little.
    """

    passes: tuple[Pass, ...]
    memory_names: tuple[str, ...]
    attention_reach: int | None
    notes: tuple[str, ...]

    @property
    def conditions(self) -> tuple[str, ...]:
        """All conditions of the passes, in the usual order."""
        found = {name for one in self.passes for name in one.conditions}
        return tuple(name for name in ALL_CONDITIONS if name in found)

    @property
    def swaps(self) -> bool:
        """Whether rows are swapped, so that a batch needs two."""
        return "swapped" in self.conditions

    def ablate(self, states: States, condition: str) -> States:
        """The states that `condition` goes on from; `states` itself is left as it was.

        Raises:
            ValueError: when a single row should be swapped.
        """
        if condition == "reset":
            return states | {name: states[name].reset() for name in self.memory_names}
        if condition == "swapped":
            rows = states[self.memory_names[0]].batch_size
            if rows < 2:
                raise ValueError("swapping memories needs two rows or more")
            donors = torch.arange(rows).roll(1)
            return states | {name: states[name].select(donors) for name in self.memory_names}
        return states


def control_passes(wanted: Sequence[str]) -> list[Pass]:
    """The passes over other prompts, for any model."""
    return [Pass((name,), variant=name) for name in ("changed", "absent") if name in wanted]


def make_plan(model: nn.Module, wanted: Sequence[str] = ALL_CONDITIONS) -> Plan:
    """Those of the conditions `wanted` that apply to a model with memories; "on" always does."""
    memories = model.memories()
    names = tuple(model.memory_state_names())
    stateless = sorted(
        {
            module.name
            for key, module in memories.items()
            # An output memory without a state searches a corpus; off is all that can be done to it.
            if key not in names and not isinstance(module, OutputMemory)
        }
    )
    reach = attention_reach(model)
    ablated = [name for name in ("reset", "swapped") if names and name in wanted]
    passes = [Pass(("on", *ablated))]
    notes = []
    if not memories:
        notes.append("The model has no memory: off, reset and swapped do not apply.")
    elif "off" in wanted:
        passes.append(Pass(("off",), use_memory=False))
    if stateless and "zeroed" in wanted:
        passes.append(Pass(("zeroed",), ablation=partial(zeroed_values, model)))
        listed = ", ".join(stateless)
        notes.append(
            f"zeroed: the values of {listed} count as zero; it carries no state, so reset and "
            f"swapped {'leave it as it is' if names else 'do not apply'}."
        )
    if names and reach is None:
        notes.append(
            "Attention reaches the whole context: without the memory the model can still look back."
        )
    return Plan((*passes, *control_passes(wanted)), names, reach, tuple(notes))


def attention_reach(model: nn.Module) -> int | None:
    """How many tokens back attention and its convolutions can look through all layers together.

    None when a layer attends to everything. A model with an attached memory knows what its own
    attention sees.
    """
    reach = 0
    if isinstance(model, AttachedMixin):
        if model.attention_reach is None:
            return None
        reach = model.attention_reach
    for module in model.modules():
        if isinstance(module, Attention):
            if module.window is None:
                return None
            reach += module.window - 1
            if module.convolution is not None:
                reach += module.convolution.kernel_size - 1
    return reach
