"""Laws of saved models and of generation."""

import copy
import functools
import tempfile
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from memlm import MemLMForCausalLM
from tests.memory.law_tools import (
    LENGTH,
    Case,
    assert_close,
    draw_cuts,
    draw_ids,
    model_of,
    pieces,
    run,
)


@torch.no_grad()
def save_load(case: Case, data) -> None:
    """A saved model comes back bit by bit; loaded as bf16 it keeps fp32 decay parameters."""
    model = model_of(case, torch.float32)
    ids = draw_ids(data, 2)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    loaded, half = _reloaded(case)
    found = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), f"{name} differs after loading"
    assert torch.equal(run(loaded, ids)[0], run(model, ids)[0])

    kept = model._keep_in_fp32_modules_strict
    for name, parameter in half.named_parameters():
        wanted = torch.float32 if kept.intersection(name.split(".")) else torch.bfloat16
        assert parameter.dtype == wanted, f"{name} is {parameter.dtype}"
        assert torch.equal(parameter, tensors[name].to(wanted))
    first, states = run(half, ids[:, :9])
    second, _ = run(half, ids[:, 9:], states)
    assert first.dtype == second.dtype == torch.bfloat16
    assert first.isfinite().all() and second.isfinite().all()


@functools.lru_cache(maxsize=1)
def _reloaded(case: Case) -> tuple[MemLMForCausalLM, MemLMForCausalLM]:
    """The model of a case after a save, in float32 and in bf16; every draw shares them."""
    with tempfile.TemporaryDirectory() as folder:
        model_of(case, torch.float32).save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    # A copy lies aligned in memory; products round by how weights lie in the mapped file.
    return copy.deepcopy(loaded), half


def generate(model: MemLMForCausalLM, ids: Tensor, new_tokens: int = 6, **kwargs: Any):
    """Sequences, per-step logits and beam scores of `new_tokens` new tokens."""
    kwargs.setdefault("attention_mask", (ids != 0).long())
    return model.generate(
        ids,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False, **kwargs},
    )


@torch.no_grad()
def generation_cache(case: Case, data) -> None:
    """Generating with the cache equals recomputing everything at every step."""
    model = model_of(case)
    ids = draw_ids(data, 2, data.draw(st.integers(1, 12), label="prompt"))
    chunk_size = data.draw(st.sampled_from([None, 1, 5]), label="prefill_chunk_size")
    cached = generate(model, ids, prefill_chunk_size=chunk_size)
    full = generate(model, ids, use_cache=False)
    assert torch.equal(cached.sequences, full.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(full.logits))


@torch.no_grad()
def left_padding(case: Case, data) -> None:
    """Padding anywhere changes nothing: in one call, in several, and left of a prompt."""
    model = model_of(case)
    lengths = [data.draw(st.integers(1, 12), label="length") for _ in range(2)]
    ids = draw_ids(data, 2, 12)
    rows = [ids[row, :length] for row, length in enumerate(lengths)]
    padded = torch.stack([torch.nn.functional.pad(row, (14 - len(row), 0)) for row in rows])
    together = generate(model, padded)
    for index, row in enumerate(rows):
        alone = generate(model, row[None])
        assert torch.equal(together.sequences[index, 14:], alone.sequences[0, len(row) :])
        assert_close(torch.stack(together.logits)[:, index], torch.stack(alone.logits)[:, 0])

    # Holes anywhere, and calls cut anywhere: rows then pass segment boundaries at different times.
    ids = draw_ids(data, 2)
    flags = st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH)
    mask = torch.tensor([data.draw(flags, label="mask") for _ in range(2)])
    mask[:, data.draw(st.integers(0, LENGTH - 1), label="valid")] = True
    parts, states = [], None
    for piece in pieces(draw_cuts(data)):
        logits, states = run(model, ids[:, piece], states, attention_mask=mask[:, piece].long())
        parts.append(logits)
    whole, _ = run(model, ids, attention_mask=mask.long())
    for row in range(2):
        expected = run(model, ids[row, mask[row]][None])[0][0]
        assert_close(whole[row, mask[row]], expected)
        assert_close(torch.cat(parts, 1)[row, mask[row]], expected)


@torch.no_grad()
def beams(case: Case, data) -> None:
    """Beam search with the cache equals beam search without it, and prompts stay apart."""
    model = model_of(case)
    ids = draw_ids(data, 2, 9)
    ids[0, : data.draw(st.integers(0, 6), label="padding")] = 0
    options = {"num_beams": 3, "num_return_sequences": 2, "new_tokens": 5}
    cached = generate(model, ids, output_scores=True, **options)
    full = generate(model, ids, output_scores=True, use_cache=False, **options)
    assert torch.equal(cached.sequences, full.sequences)
    assert_close(cached.sequences_scores, full.sequences_scores)
    assert torch.equal(cached.beam_indices, full.beam_indices)
