"""generate() with every memory, alone, behind the head and attached, against a full recompute.

Greedy search, prefill in chunks, left padding and beams are laws (tests/memory/generation_laws.py).
"""

import gc

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from tests.memory.contract import LACT, cases
from tests.memory.law_tools import assert_close, build_model, model_of
from tests.memory.test_knn_lm import CASE as KNN_LM
from tests.models.attach_tools import MEMORIES, attached

LENGTH = 17  # longer than every window, segment and chunk, and than most stores
ATTACHED = {f"attached-{name}": ("llama", name) for name in ("gated_delta", "knn_cache", "titans")}


def first_cases():
    """One case of every memory, and of every variant of Titans."""
    found = {}
    for case in cases():
        if not case.spec.slow:
            variant = case.spec.options.get("variant") if case.memory == "titans" else None
            found.setdefault((case.memory, variant), case)
    return {str(case): case for case in [*found.values(), KNN_LM]}


CASES = first_cases()


@pytest.fixture(scope="module", params=[*CASES, *ATTACHED])
def model(request):
    name = request.param
    return attached(*ATTACHED[name]) if name in ATTACHED else model_of(CASES[name])


def tokens(*shape, seed=3):
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(seed))


def generate(model, ids, new_tokens=4, **options):
    torch.manual_seed(11)
    return model.generate(
        ids,
        **{
            "attention_mask": (ids != 0).long(),
            "max_new_tokens": new_tokens,
            "do_sample": False,
            "eos_token_id": None,
            "suppress_tokens": [0],
            "pad_token_id": 0,
            "return_dict_in_generate": True,
            "output_scores": True,
            **options,
        },
    )


class Collected(BaseStreamer):
    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids.extend(value.flatten().tolist())

    def end(self):
        self.ended = True


@torch.no_grad()
def test_a_streamed_sample_from_a_prompt_in_chunks(model):
    ids, sample = tokens(1, LENGTH), {"do_sample": True, "top_k": 8, "temperature": 2.0}
    streamer = Collected()
    cached = generate(model, ids, prefill_chunk_size=5, streamer=streamer, **sample)
    full = generate(model, ids, use_cache=False, **sample)
    assert torch.equal(cached.sequences, full.sequences)
    assert streamer.ids == full.sequences[0].tolist() and streamer.ended
    tolerance = 1e-5 if cached.scores[0].dtype == torch.float32 else None
    for step, expected in zip(cached.scores, full.scores, strict=True):
        kept = expected.isfinite()
        assert torch.equal(step.isfinite(), kept)
        assert_close(step[kept], expected[kept], tolerance)


@torch.no_grad()
def test_beams_that_are_sampled(model):
    ids = tokens(2, LENGTH)
    options = {"num_beams": 2, "num_return_sequences": 2, "do_sample": True, "new_tokens": 3}
    cached = generate(model, ids, **options)
    full = generate(model, ids, use_cache=False, **options)
    assert torch.equal(cached.sequences, full.sequences)
    assert_close(cached.sequences_scores, full.sequences_scores, 1e-5)


def stopping_early(model):
    """Prompts, left-padded, and a token that ends the answer to exactly one of them early."""
    for seed in range(3, 20):
        ids = tokens(2, 9, seed=seed)
        ids[0, :4] = 0
        answers = generate(model, ids, 4).sequences[:, 9:]
        for token in answers.flatten():
            if int((answers == token).any(1).sum()) == 1:
                return ids, int(token)
    raise AssertionError("no prompts found")


@torch.no_grad()
def test_rows_that_have_stopped_read_nothing_more(model):
    """A second turn of a batch goes on where each row has stopped, as each would alone."""
    ids, token = stopping_early(model)
    first = generate(model, ids, 6, eos_token_id=token)
    assert int((first.sequences[:, -1] == 0).sum()) == 1
    history = torch.cat([first.sequences, tokens(2, 3, seed=4)], 1)
    second = generate(model, history, past_key_values=first.past_key_values)
    for row, whole in enumerate(history):
        alone = generate(model, whole[whole != 0][None])
        assert torch.equal(second.sequences[row, -4:], alone.sequences[0, -4:])


def decode(model, cache, ids):
    """Read a row token by token: the bytes of the states after every token."""
    for token in ids.split(1, 1):
        model(token, past_key_values=cache)
        yield cache.nbytes


@torch.no_grad()
def test_only_full_attention_grows_with_the_tokens(model):
    cache = model(tokens(1, 30)).past_key_values
    sizes = list(decode(model, cache, tokens(1, 16)))
    grown = bytes_per_token(cache.states["base"]) if "base" in cache.names else 0
    assert sizes == [sizes[0] + grown * step for step in range(16)]


@pytest.mark.slow
@torch.no_grad()
def test_nothing_is_kept_alive_beside_the_states():
    model = build_model(
        [
            {"mixer": {"type": "sliding_attention", "window": 6}, "memory": {"type": name, **spec}}
            for name, spec in (*MEMORIES.items(), ("lact", LACT))
        ],
        output={"type": "neural_cache", "capacity": 8},
    )
    cache = model(tokens(1, 30)).past_key_values
    sizes = [alive() for _ in decode(model, cache, tokens(1, 12))]
    assert len(set(sizes[2:])) == 1


def bytes_per_token(base):
    """Of the keys and values of a pretrained model whose attention has no window."""
    return sum(tensor[:, :, 0].nbytes for tensor in (*base.keys, *base.values)) + 8


def alive():
    """Bytes of all tensors, those of a shared storage once."""
    gc.collect()
    storages = [t.untyped_storage() for t in gc.get_objects() if type(t) is torch.Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
