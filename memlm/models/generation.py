"""generate() of models whose cache holds memories: what it carries from step to step, and refuses.

Everything is transformers' own but for this: a state never takes a token back, so padding must
never be read, and every way to generate that tries tokens and drops them cannot work.
"""

import os
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMode, StoppingCriteriaList

from memlm.errors import UserError
from memlm.layers.state import MemoryState
from memlm.models.cache import MemLMCache, check_cache
from memlm.models.memory_state_files import load_memory_state, save_memory_state

MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
_NOT_IN_GENERATE = {
    "memory_states": "generate() takes states as a cache: past_key_values=MemLMCache(states)",
    "segment_ids": "generate() continues one document per row; segment_ids mean nothing there",
}


class FinishedRows(StoppingCriteriaList):
    """Stopping criteria that remember which rows have met them.

    Attributes:
        rows: bool [B]; None before the first token.
    """

    rows: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        self.rows = done if self.rows is None else self.rows | done
        return done


class MemoryGeneration:
    """Comes before GenerationMixin; the model's `forward` keeps its states in a MemLMCache."""

    _is_stateful = True

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> tuple[Tensor, str | None, dict]:
        inputs, name, model_kwargs = super()._prepare_model_inputs(*args, **kwargs)
        embeds = model_kwargs.get("inputs_embeds")
        if (inputs if embeds is None else embeds).shape[1] == 0:
            raise UserError(
                "the prompt has no token; give at least one, or no prompt and a bos_token_id"
            )
        for argument in ("memory_states", "segment_ids"):
            if model_kwargs.get(argument) is not None:
                raise UserError(_NOT_IN_GENERATE[argument])
        check_cache(model_kwargs.get("past_key_values"))
        return inputs, name, model_kwargs

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict):
        position_ids = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is None:  # use_cache=False
            return position_ids
        return cache.continued_positions(
            position_ids, model_kwargs.get("attention_mask"), inputs_tensor.shape[0]
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict,
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise UserError(
                "a row of the prompt ends in padding, and what follows padding is not what "
                "follows the text; pad on the left (tokenizer.padding_side = 'left')"
            )
        if generation_config.prefill_chunk_size and model_kwargs.get("inputs_embeds") is not None:
            raise UserError("prefill_chunk_size cuts a prompt of input_ids, not of inputs_embeds")
        cache = model_kwargs.get("past_key_values")
        if generation_config.use_cache is False:
            if cache is not None:
                raise UserError("past_key_values is given, but use_cache=False forbids to use it")
            return
        if cache is None:
            kind = generation_config.cache_implementation
            if kind not in (None, "dynamic"):
                raise UserError(
                    f"cache_implementation {kind!r} cannot hold memories; leave it unset"
                )
            model_kwargs["past_key_values"] = MemLMCache()
            return
        cache._is_user_defined = True  # it outlives generate(), which must leave it exact
        if cache.states is not None:
            columns = (
                mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", 0)
            )
            if 0 < columns <= cache.columns:
                raise UserError(
                    f"the cache has read {cache.columns} columns, and the prompt has {columns}: "
                    "give the whole conversation with new tokens behind it; or the tokens that "
                    "are not read yet alone (the last one of an answer and the new ones) with "
                    "past_key_values=MemLMCache(cache.states)"
                )
            copies = max(generation_config.num_beams, generation_config.num_return_sequences)
            if copies > 1:  # generate() has repeated the prompts
                model_kwargs["past_key_values"] = cache.repeated(copies)  # the given one stays

    def _sample(
        self, input_ids: Tensor, *, stopping_criteria: StoppingCriteriaList, **kwargs: Any
    ) -> Any:
        """As in transformers; the padding behind rows that have stopped is not read.

        Without an end-of-text token there is no padding: such rows go on with real tokens.
        """
        cache = kwargs.get("past_key_values")
        pads = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
        if not pads or not isinstance(cache, MemLMCache):
            return super()._sample(input_ids, stopping_criteria=stopping_criteria, **kwargs)
        cache.finished = FinishedRows(stopping_criteria)
        try:
            return super()._sample(input_ids, stopping_criteria=cache.finished, **kwargs)
        finally:
            cache.finished = None

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> dict:
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, **kwargs
        )
        cache = model_kwargs.get("past_key_values")
        finished = cache.finished.rows if getattr(cache, "finished", None) is not None else None
        if finished is None or not bool(finished.any()):
            return model_kwargs
        mask = model_kwargs.get("attention_mask")
        if mask is None:  # generate() drops one that hides nothing
            columns = cache.columns + 1
            mask = torch.ones(len(finished), columns, dtype=torch.int64, device=finished.device)
        model_kwargs["attention_mask"] = torch.cat(
            [mask[:, :-1], (~finished)[:, None].to(mask)], dim=1
        )
        return model_kwargs

    def _get_deprecated_gen_repo(
        self,
        generation_mode: GenerationMode,
        trust_remote_code: bool,
        custom_generate: Any = None,
    ) -> str | None:
        # The first step of generate() that knows the mode; most of these are code from the Hub.
        if custom_generate is None and generation_mode not in MODES:
            name = generation_mode.value.replace("_", " ")
            raise UserError(
                f"{name} does not work with a memory, which takes no token back; valid: greedy "
                "search, sampling, and beam search with or without sampling"
            )
        return super()._get_deprecated_gen_repo(generation_mode, trust_remote_code, custom_generate)

    def save_memory_state(
        self, path: str | os.PathLike, states: MemLMCache | dict[str, MemoryState]
    ) -> None:
        """Write what a conversation has left in the states; see `memory_state_files`."""
        save_memory_state(self, path, states)

    def load_memory_state(self, path: str | os.PathLike) -> MemLMCache:
        """A saved conversation for generate() to go on from; see `memory_state_files`."""
        return load_memory_state(self, path)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused.

        Raises:
            UserError: always.
        """
        raise UserError(
            "continuous batching keeps keys and values in pages, which cannot hold memories; "
            "call generate() with rows padded on the left"
        )
