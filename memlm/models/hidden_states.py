"""Whether a call returns the hidden states of every layer; weights of attention it never does."""

from torch import Tensor
from transformers import PreTrainedConfig

from memlm.errors import UserError


def room_for_hidden_states(
    config: PreTrainedConfig, output_hidden_states: bool | None, output_attentions: bool | None
) -> list[Tensor] | None:
    """An empty list where a call is to return its hidden states, else None.

    Args:
        config: of the model; it says what None means.
        output_hidden_states, output_attentions: the arguments of the call.

    Raises:
        UserError: when weights of attention are asked for, or hidden states by their numbers.
    """
    if _flag(config, "output_attentions", output_attentions):
        raise UserError(
            "output_attentions: the weights of attention are not kept; leave it unset "
            "(output_hidden_states=True gives the hidden states of every layer)"
        )
    wanted = _flag(config, "output_hidden_states", output_hidden_states)
    if not isinstance(wanted, bool):
        raise UserError(f"output_hidden_states is {wanted!r}; it must be true or false")
    return [] if wanted else None


def _flag(config: PreTrainedConfig, name: str, given: bool | None) -> bool:
    return getattr(config, name, None) or False if given is None else given
