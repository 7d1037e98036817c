"""generate() with states in the cache: everything equals a full recompute."""

import copy
import threading

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer

from memlm import MemLMCache, MemLMForCausalLM, UserError
from memlm.data.tokenizers import ByteTokenizer
from memlm.models.cache import StateLayer
from tests.memory.law_tools import build_model

SLIDING = {"type": "sliding_attention", "window": 5, "num_heads": 2, "conv_size": 3}
MEMORY = {"type": "gated_delta", "num_heads": 2, "head_dim": 8}
LAYERS = [
    {"mixer": SLIDING, "memory": MEMORY, "ffn": "swiglu"},
    {"mixer": {"type": "attention", "num_heads": 2}, "ffn": "swiglu"},
]
GREEDY = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model():
    return build_model(LAYERS)


def tokens(*shape, seed=3):
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(seed))


def recompute(model, ids, count, **kwargs):
    """Greedy continuation, every step from scratch."""
    for _ in range(count):
        logits = model(ids, use_cache=False, **kwargs).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids


def test_greedy(model):
    ids = tokens(2, 9)
    expected = recompute(model, ids, 7)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), expected)


@pytest.mark.parametrize("size", [1, 4, 100])
def test_chunked_prefill(model, size):
    ids = tokens(2, 9)
    expected = recompute(model, ids, 7)
    assert torch.equal(model.generate(ids, prefill_chunk_size=size, **GREEDY), expected)


def test_sampling_with_a_seed(model):
    ids = tokens(2, 9)
    results = []
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 2}):
        torch.manual_seed(11)
        results.append(model.generate(ids, **{**GREEDY, "do_sample": True, "top_k": 8}, **options))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    torch.manual_seed(12)
    other = model.generate(ids, **{**GREEDY, "do_sample": True, "top_k": 8})
    assert not torch.equal(other, results[0])


def test_beams_with_return_sequences_and_sampling(model):
    ids = tokens(2, 9)
    for options in ({"num_beams": 4, "num_return_sequences": 3}, {"num_return_sequences": 2}):
        sample = {**GREEDY, "do_sample": "num_beams" not in options, **options}
        torch.manual_seed(5)
        cached = model.generate(ids, **sample)
        torch.manual_seed(5)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **sample))
        assert cached.shape[0] == 2 * options["num_return_sequences"]


def test_hidden_states_of_every_step_and_no_weights_of_attention(model):
    ids = tokens(2, 9)
    options = {**GREEDY, "return_dict_in_generate": True}
    answer = model.generate(ids, output_hidden_states=True, **options)
    whole = model(answer.sequences[:, :-1], output_hidden_states=True).hidden_states
    for layer, expected in enumerate(whole):
        found = torch.cat([step[layer] for step in answer.hidden_states], 1)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(UserError, match="output_attentions: the weights"):
        model.generate(ids, output_attentions=True, **options)
    with pytest.raises(UserError, match=r"output_hidden_states is \[1\]; it must be true or false"):
        model(ids, output_hidden_states=[1])


def test_left_padding_is_derived_from_the_mask(model):
    short, long = tokens(1, 4), tokens(1, 9, seed=4)
    padded = torch.zeros(2, 9, dtype=torch.int64)
    padded[0, 5:], padded[1] = short, long
    mask = (padded > 0).long()
    together = model.generate(padded, attention_mask=mask, **GREEDY)
    assert torch.equal(together[0, 9:], model.generate(short, **GREEDY)[0, 4:])
    assert torch.equal(together[1], model.generate(long, **GREEDY)[0])


@pytest.mark.parametrize("variant", ["mac", "mag", "mal"])
def test_a_first_piece_of_nothing_but_padding(variant):
    sizes = {"num_heads": 2, "head_dim": 8, "depth": 1, "attention_heads": 2}
    model = build_model([{"mixer": {"type": "titans", "variant": variant, **sizes}}])
    ids = tokens(1, 4)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = (padded > 0).long()
    continued = model.generate(padded, attention_mask=mask, prefill_chunk_size=2, **GREEDY)
    assert torch.equal(continued[0, 7:], model.generate(ids, **GREEDY)[0, 4:])


def test_rows_that_stop_early_do_not_disturb_the_others(model):
    ids = tokens(3, 6)
    free = model.generate(ids, **GREEDY)
    stop = int(free[0, 8])
    stopped = model.generate(
        ids, max_new_tokens=7, do_sample=False, eos_token_id=stop, pad_token_id=0
    )
    for row in range(3):
        new = free[row, 6:].tolist()
        length = new.index(stop) + 1 if stop in new else 7
        assert stopped[row, 6 : 6 + length].tolist() == new[:length]


def test_two_turns_with_one_cache(model):
    first, second = tokens(2, 6), tokens(2, 5, seed=8)
    out = model.generate(first, return_dict_in_generate=True, **GREEDY)
    assert isinstance(out.past_key_values, MemLMCache)
    assert out.past_key_values.get_seq_length() == 12  # the last token is not read yet
    history = torch.cat([out.sequences, second], 1)
    again = model.generate(history, past_key_values=out.past_key_values, **GREEDY)
    assert torch.equal(again, recompute(model, history, 7))


def test_two_turns_with_left_padding(model):
    ids = tokens(2, 6)
    ids[0, :3] = 0
    mask = (ids > 0).long()
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    history = torch.cat([out.sequences, tokens(2, 4, seed=8)], 1)
    mask = torch.cat([mask, torch.ones(2, 11, dtype=torch.int64)], 1)
    options = {"attention_mask": mask, **GREEDY}
    again = model.generate(history, past_key_values=out.past_key_values, **options)
    assert torch.equal(again, model.generate(history, **options))


def test_forward_with_cache_continues_it(model):
    ids = tokens(2, 10)
    first = model(ids[:, :4])
    second = model(ids[:, 4:], past_key_values=first.past_key_values)
    assert second.past_key_values is first.past_key_values
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected)
    assert model(ids, use_cache=False).past_key_values is None


@pytest.mark.parametrize("options", [{"use_memory": False}, {"write_memory": False}])
def test_memory_switches_reach_every_step(model, options):
    ids = tokens(2, 9)
    expected = recompute(model, ids, 7, **options)
    assert torch.equal(model.generate(ids, **options, **GREEDY), expected)
    assert not torch.equal(expected, recompute(model, ids, 7))


def test_frozen_memory_in_generation_reads_what_was_written_before(model):
    ids = tokens(1, 12)
    states = model(ids[:, :8], return_memory_states=True).memory_states
    cache = MemLMCache(states)
    cache.columns = 8
    model.generate(ids, past_key_values=cache, write_memory=False, **GREEDY)
    assert cache.states["0.memory"] is states["0.memory"]
    assert cache.states["0.mixer"] is not states["0.mixer"]


def test_generation_goes_on_from_states(model):
    ids = tokens(2, 12)
    states = model(ids[:, :8], return_memory_states=True).memory_states
    continued = model.generate(ids[:, 8:], past_key_values=MemLMCache(states), **GREEDY)
    assert torch.equal(continued, model.generate(ids, **GREEDY)[:, 8:])
    alone = model.generate(ids[:, 8:], **GREEDY)
    assert not torch.equal(continued, alone)
    # Rows that were reset begin a document; padding in front of a prompt counts for nothing.
    reset = {name: s.reset(torch.tensor([True, False])) for name, s in states.items()}
    prompt = torch.nn.functional.pad(ids[:, 8:], (2, 0))
    mask = torch.ones_like(prompt)
    mask[:, :2] = 0
    cache = MemLMCache(reset)
    mixed = model.generate(prompt, attention_mask=mask, past_key_values=cache, **GREEDY)[:, 2:]
    assert torch.equal(mixed, torch.stack([alone[0], continued[1]]))


def test_states_of_other_rows_are_refused(model):
    states = model(tokens(2, 6), return_memory_states=True).memory_states
    with pytest.raises(UserError, match="those of 2 rows, but the call has 3"):
        model(tokens(3, 6), memory_states=states)


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"prompt_lookup_num_tokens": 2}, "assisted generation"),
        ({"assistant_early_exit": 1}, "assisted generation"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "contrastive search"),
        ({"dola_layers": "low"}, "dola generation"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "group beam search"),
        ({"num_beams": 4, "force_words_ids": [[3]]}, "constrained beam search"),
    ],
)
def test_modes_that_take_tokens_back_are_refused(model, options, mode):
    message = f"{mode} does not work with a memory.*valid: greedy search, sampling, and beam"
    with pytest.raises(UserError, match=message):
        model.generate(tokens(1, 6), **{**GREEDY, **options})


def test_assistants_and_paged_caches_are_refused(model):
    with pytest.raises(UserError, match="assisted generation does not work"):
        model.generate(tokens(1, 6), assistant_model=build_model(LAYERS), **GREEDY)
    for refused in (
        lambda: model.generate(tokens(1, 6), cache_implementation="paged", **GREEDY),
        lambda: model.generate_batch([[1, 2, 3]], generation_config=model.generation_config),
    ):
        with pytest.raises(UserError, match="continuous batching .* cannot hold memories"):
            refused()


def test_padding_on_the_right_is_refused(model):
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    with pytest.raises(UserError, match="ends in padding.*pad on the left"):
        model.generate(ids, attention_mask=mask, **GREEDY)
    with pytest.raises(UserError, match="ends in padding.*pad on the left"):
        model.generate(ids * mask, **GREEDY)  # the mask is found by the padding token


def test_prompts_of_nothing(model):
    begun = model.generate(bos_token_id=3, **GREEDY)
    assert torch.equal(begun, model.generate(torch.tensor([[3]]), **GREEDY))
    with pytest.raises(ValueError, match="`bos_token_id` has to be defined"):
        model.generate(**GREEDY)
    for rows in (1, 2):
        empty = torch.empty(rows, 0, dtype=torch.int64)
        with pytest.raises(UserError, match="the prompt has no token"):
            model.generate(empty, **GREEDY)


def test_a_prompt_of_embeddings(model):
    ids = tokens(2, 9)
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        answer = model.generate(inputs_embeds=embeds, **GREEDY)
        with pytest.raises(UserError, match="prefill_chunk_size cuts a prompt of input_ids"):
            model.generate(inputs_embeds=embeds, prefill_chunk_size=4, **GREEDY)
    assert torch.equal(answer, model.generate(ids, **GREEDY)[:, 9:])


def test_new_tokens_alone_need_a_mask_of_the_whole_or_states(model):
    def turn():
        return model.generate(tokens(2, 6), return_dict_in_generate=True, **GREEDY)

    out, new = turn(), tokens(2, 5, seed=8)
    cache, history = out.past_key_values, torch.cat([out.sequences, new], 1)
    expected = recompute(model, history, 7)[:, -7:]
    unread = history[:, cache.columns :]
    for ids in (new, history[:, : cache.columns]):
        with pytest.raises(UserError, match="read 12 columns, and the prompt has .*MemLMCache"):
            model.generate(ids, past_key_values=cache, **GREEDY)
    with pytest.raises(UserError, match="use_cache=False forbids"):
        model.generate(history, past_key_values=cache, use_cache=False, **GREEDY)

    from_states = model.generate(unread, past_key_values=MemLMCache(cache.states), **GREEDY)
    assert torch.equal(from_states[:, -7:], expected)
    for options in ({}, {"prefill_chunk_size": 2}):
        options = {"attention_mask": torch.ones_like(history), **options, **GREEDY}
        answer = model.generate(unread, past_key_values=turn().past_key_values, **options)
        assert torch.equal(answer[:, -7:], expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 3}])
def test_several_answers_go_on_from_one_cache(model, options):
    ids = tokens(2, 12)
    cache = model(ids[:, :8]).past_key_values
    before = {name: state.tensors() for name, state in cache.states.items()}
    options = {**GREEDY, "do_sample": True, **options}
    torch.manual_seed(3)
    continued = model.generate(ids, past_key_values=cache, **options)
    torch.manual_seed(3)
    assert torch.equal(continued, model.generate(ids, **options))
    for name, state in cache.states.items():  # a copy of each row went on
        for field, tensor in state.tensors().items():
            assert tensor is before[name][field]


def test_rows_that_have_stopped_read_no_padding(model):
    """Also behind a stop string, and where the end-of-text token is the padding."""
    tokenizer = ByteTokenizer()
    torch.manual_seed(0)
    config = copy.deepcopy(model.config)
    config.vocab_size = len(tokenizer)
    wide = MemLMForCausalLM(config).double().eval()
    ids = tokens(2, 6)
    free = wide.generate(ids, **GREEDY)[:, 6:]
    row, column = next(
        (row, column)
        for row in (0, 1)
        for column in range(5)
        if free[row, column] not in free[1 - row] and free[row, column] < 128
    )
    stop = free[row, column].item()
    for options in (
        {"stop_strings": [chr(stop)], "tokenizer": tokenizer, "eos_token_id": 257},
        {"eos_token_id": stop, "pad_token_id": stop},
    ):
        options = {"pad_token_id": 258, **GREEDY, "return_dict_in_generate": True, **options}
        out = wide.generate(ids, **options)
        length = 6 + free[row].tolist().index(stop) + 1
        mask = torch.ones_like(out.sequences)
        mask[row, length:] = 0
        assert bool((out.sequences[row, length:] == options["pad_token_id"]).all())
        read = out.past_key_values.states["position"].next_position
        assert read.tolist() == mask[:, : out.past_key_values.columns].sum(1).tolist()
        history = torch.cat([out.sequences, tokens(2, 3, seed=9)], 1)
        mask = torch.cat([mask, torch.ones(2, 3, dtype=torch.int64)], 1)
        options = {"attention_mask": mask, **GREEDY}
        again = wide.generate(history, past_key_values=out.past_key_values, **options)
        assert torch.equal(again, wide.generate(history, use_cache=False, **options))


def test_a_stream_that_another_thread_reads(model):
    tokenizer, ids = ByteTokenizer(), tokens(1, 6)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    options = {"streamer": streamer, **GREEDY}
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs=options)
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == tokenizer.decode(model.generate(ids, **GREEDY)[0, 6:])


def test_arguments_that_mean_nothing_to_generate_are_refused(model):
    ids = tokens(2, 6)
    with pytest.raises(UserError, match="past_key_values=MemLMCache.states"):
        model.generate(ids, memory_states=model.init_states(2), **GREEDY)
    with pytest.raises(UserError, match="segment_ids mean nothing there"):
        model.generate(ids, segment_ids=torch.ones_like(ids), **GREEDY)
    with pytest.raises(UserError, match="those of 6 rows, but the call has 2"):
        model.generate(ids, past_key_values=MemLMCache(model.init_states(6)), **GREEDY)


def test_other_caches_are_refused(model):
    for call in (model, model.generate):
        with pytest.raises(UserError, match="DynamicCache, which cannot hold memories"):
            call(tokens(1, 6), past_key_values=DynamicCache())
        with pytest.raises(UserError, match="tuple, which cannot hold memories"):
            call(tokens(1, 6), past_key_values=((torch.zeros(1), torch.zeros(1)),))
    with pytest.raises(UserError, match="cache_implementation 'static'"):
        model.generate(tokens(1, 6), cache_implementation="static", **GREEDY)


def test_cache_rearranges_every_state(model):
    cache = model(tokens(3, 6)).past_key_values
    before = {name: state.tensors() for name, state in cache.states.items()}
    assert cache.nbytes == sum(state.nbytes for state in cache.states.values())
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    for name, state in cache.states.items():
        for key, tensor in state.tensors().items():
            assert torch.equal(tensor, before[name][key][order])
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    for name, state in cache.states.items():
        for key, tensor in state.tensors().items():
            assert torch.equal(tensor, before[name][key][[2, 2]])
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = tokens(2, 5)
    fresh = model(ids).logits
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, fresh)


def test_cache_layers_take_no_keys(model):
    layer = StateLayer()
    with pytest.raises(TypeError, match="the model itself fills"):
        layer.update(torch.zeros(1), torch.zeros(1))
    with pytest.raises(TypeError, match="the model itself fills"):
        layer.lazy_initialization(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="cannot be offloaded"):
        layer.offload()
    assert MemLMCache().states is None and not layer.is_croppable
    assert layer.get_max_length() == -1 and layer.get_seq_length() == 0
    assert layer.get_mask_sizes(4) == (4, 0)


def test_model_without_states_generates(model):
    plain = build_model([{"ffn": "swiglu"}])
    ids = tokens(1, 4)
    assert torch.equal(plain.generate(ids, **GREEDY), recompute(plain, ids, 7))
