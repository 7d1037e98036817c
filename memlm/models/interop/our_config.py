"""What maps of other architectures share about the layers of a model of ours."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from memlm.errors import UserError
from memlm.layers.attention import AttentionConfig
from memlm.models.configuration import LayerPlan, MemLMConfig

ATTENTION = ("attention", "sliding_attention")


def grouped(patterns: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """`layers` of a `MemLMConfig`: equal blocks behind one another as one pattern."""
    return [{"repeat": len(list(same)), **pattern} for pattern, same in itertools.groupby(patterns)]


def attention(window: int | None = None, **values: Any) -> dict[str, Any]:
    """An attention mixer; its name tells whether it has a window."""
    if window is None:
        return {"type": "attention", **values}
    return {"type": "sliding_attention", **values, "window": window}


class OurConfig:
    """A model of ours as a map of `model_type` writes it: what the map does not take is refused.

    Args:
        config: of the model.
        model_type: that it is written as, for messages.
    """

    def __init__(self, config: MemLMConfig, model_type: str):
        self.config = config
        self.model_type = model_type
        self.plans: list[LayerPlan] = config.plan()
        if config.output is not None:
            self.refuse("output", "the output memory")
        if config.final_logit_softcapping is not None:
            self.refuse("final_logit_softcapping", "a bound of the logits")

    def refuse(self, where: str, what: str) -> None:
        """Raise UserError for what has no place on the other side."""
        raise UserError(f"{where}: {what} has no place in a {self.model_type} model")

    def plain_layers(self, *mixers: str) -> None:
        """Check that every block is a pre-norm, one of `mixers` and a swiglu of one width.

        Raises:
            UserError: for the first layer that is something else.
        """
        width = self.intermediate_size
        for index, plan in enumerate(self.plans):
            where = f"layer {index}"
            if plan.norm != "pre":
                self.refuse(f"{where}.norm", repr(plan.norm))
            if plan.memory is not None:
                self.refuse(f"{where}.memory", repr(plan.memory[0]))
            for site, valid in (("mixer", mixers), ("ffn", ("swiglu",))):
                entry = getattr(plan, site)
                if entry is None or entry[0] not in valid:
                    self.refuse(f"{where}.{site}", repr(entry and entry[0]))
            if (plan.ffn[1].intermediate_size or self.config.intermediate_size) != width:
                self.refuse(f"{where}.ffn", "another intermediate_size than that of layer 0")

    @property
    def intermediate_size(self) -> int:
        """Of the first layer."""
        ffn = self.plans[0].ffn
        own = getattr(ffn[1], "intermediate_size", None) if ffn is not None else None
        return own or self.config.intermediate_size

    def only(self, where: str, spec: Any, *held: str) -> None:
        """Check that all options but those `held` are at their defaults.

        Raises:
            UserError: for the first that is not.
        """
        for field in dataclasses.fields(spec):
            value = getattr(spec, field.name)
            if field.name not in held and value != field.default:
                self.refuse(where, f"{field.name} {value!r}")

    def same(self, mixers: Sequence[tuple[int, Any]], *apart: str) -> Any:
        """The options that the mixers (with the index of their layer) share.

        Args:
            apart: names of options that each may have its own of.

        Raises:
            UserError: where one has others than the first.
        """
        first_index, first = mixers[0]
        for index, spec in mixers[1:]:
            for field in dataclasses.fields(first):
                value, expected = getattr(spec, field.name), getattr(first, field.name)
                if field.name not in apart and value != expected:
                    self.refuse(
                        f"layer {index}.mixer",
                        f"{field.name} {value!r} beside {expected!r} of layer {first_index}",
                    )
        return first

    def mixers(self, *names: str) -> list[tuple[int, Any]]:
        """The options of the mixers of these names, with the index of their layer."""
        found = enumerate(plan.mixer for plan in self.plans)
        return [(index, mixer[1]) for index, mixer in found if mixer and mixer[0] in names]

    def rope_parameters(self, where: str, spec: AttentionConfig) -> dict[str, Any]:
        """The `rope_parameters` of an attention layer, but for a part that is left unturned.

        Raises:
            UserError: for attention without rotary positions.
        """
        if not spec.rope:
            self.refuse(where, "attention without rotary positions")
        scaling = spec.rope_scaling or {"rope_type": "default"}
        return {**scaling, "rope_theta": spec.rope_theta}

    def model_values(self) -> dict[str, Any]:
        """What most architectures call the same; no limit of length where there is none."""
        config = self.config
        names = ("vocab_size", "hidden_size", "initializer_range", "tie_word_embeddings")
        tokens = ("pad_token_id", "bos_token_id", "eos_token_id")
        values = {name: getattr(config, name) for name in (*names, *tokens)}
        if config.max_position_embeddings is not None:
            values["max_position_embeddings"] = config.max_position_embeddings
        return values | {
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": len(self.plans),
        }
