"""Models of transformers in segments say what they say to the whole text in one call."""

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from memlm.data import ByteTokenizer
from memlm.errors import UserError
from memlm.evaluation.conditions import Pass
from memlm.evaluation.costs import Meter
from memlm.evaluation.prompts import Context, Question, Trial
from memlm.evaluation.transformers_subject import Reading, TransformersSubject

SMALL = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {
    **SMALL,
    "intermediate_size": 48,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
OLD = {"vocab_size": 259, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
STATES = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
MODELS = {
    "llama": GROUPED,
    "gpt2": OLD,
    "mistral": {**GROUPED, "sliding_window": 6},
    "gemma3_text": {
        **GROUPED,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3": GROUPED,
    "gpt_neox": GROUPED,
    "opt": {**SMALL, "ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 259, "hidden_size": 32, "n_layer": 2, "n_head": 2},
    "mpt": {"vocab_size": 259, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 128},
    "mamba": STATES,
    "falcon_mamba": STATES,
    "mamba2": {**STATES, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "rwkv": {**SMALL, "attention_hidden_size": 32, "intermediate_size": 48},
    "bamba": {
        **GROUPED,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
        "attn_layer_indices": [1],
    },
    "openai-gpt": OLD,
}
NOT_CAUSAL = {"bert": GROUPED}
READINGS = {
    "mamba": Reading("tokens"),
    "falcon_mamba": Reading("tokens"),
    "rwkv": Reading("segments", together=False),
    "openai-gpt": Reading("whole"),
}
REACH = {"mistral": 2 * 5, "mamba": 0, "falcon_mamba": 0, "mamba2": 0, "rwkv": 0}
LIMITS = {"mistral": None, "gpt2": 128, "opt": 128, "mpt": 128, "bloom": None, "openai-gpt": 128}


def build(name: str, dtype=torch.float64) -> PreTrainedModel:
    """An untrained model with decided opinions."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    # Not through the auto classes: an imported library may have put classes of its own there.
    config = getattr(transformers, CONFIG_MAPPING_NAMES[name])(
        **(MODELS | NOT_CAUSAL)[name], **ends
    )
    model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model.to(dtype)


def subject(model: PreTrainedModel, segment: int = 7) -> TransformersSubject:
    return TransformersSubject(model, ByteTokenizer(), segment)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(3))


def contexts(ids: torch.Tensor) -> list[Context]:
    return [Context([row.numpy()]) for row in ids]


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


@torch.inference_mode()
def test_reading_in_segments_is_one_call(name):
    model = build(name)
    one = subject(model)
    assert one.reading == READINGS.get(name, Reading("segments"))
    ids = tokens(3, 40)
    whole = model(ids).logits
    states = one.read_contexts(contexts(ids[:, :24]))
    kept = one.fork(states)
    score, _ = one.score(ids[:, 24:], None, one.fork(states), True)
    torch.testing.assert_close(score, whole[:, 24:], rtol=1e-4, atol=1e-4)
    for last in (30, 31, 32):  # five tokens, then one by one
        start = {30: 24}.get(last, last - 1)
        logits, states = one.step(ids[:, start:last], None, states, True)
        torch.testing.assert_close(logits, whole[:, last - 1], rtol=1e-4, atol=1e-4)
    # Going on has left the fork where it was.
    logits, _ = one.step(ids[:, 24:30], None, kept, True)
    torch.testing.assert_close(logits, whole[:, 29], rtol=1e-4, atol=1e-4)


def test_answers_are_those_of_generate(name):
    model = build(name)
    one = subject(model)
    ids = tokens(1, 30)
    states = one.read_contexts(contexts(ids[:, :21]))
    written = one.generate([ids[0, 21:].numpy()], states, 8)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
    assert written[0] == [token for token in expected[0, 30:].tolist() if token != 257]


def test_plan(name):
    one = subject(build(name))
    assert one.plan.conditions == ("on", "changed", "absent")
    assert one.plan.attention_reach == REACH.get(name)
    unlimited = REACH.get(name) == 0
    assert one.max_context == (None if unlimited else LIMITS.get(name, one.max_context))
    assert name in LIMITS or unlimited or one.max_context >= 256
    assert one.plan.notes[0].startswith("The model has no memory")
    assert len(one.plan.notes) == 1 + (name in READINGS)


def test_bytes_of_the_states(name):
    model = build(name)
    one = subject(model)
    found = [one.state_bytes(one.read_contexts(contexts(tokens(2, length)))) for length in (20, 40)]
    assert all(sizes.memory == 0 for sizes in found)
    if name in REACH:
        # What is carried has one size; a window keeps its last tokens.
        assert found[0] == found[1] and found[0].total > 0
    if name in ("llama", "qwen3", "gemma3_text"):
        full = 1 if name == "gemma3_text" else 2
        expected = [8 * 2 * 16 * (full * length + (2 - full) * 5) for length in (20, 40)]
        assert [sizes.key_values for sizes in found] == expected
        assert [sizes.total for sizes in found] == expected
    if name == "bamba":
        assert 0 < found[0].key_values < found[0].total
        assert found[1].key_values == 2 * found[0].key_values
    if REACH.get(name) == 0:
        assert found[0].key_values == 0


@pytest.mark.parametrize("name", ["llama", "mistral", "mamba2", "mamba", "rwkv", "openai-gpt"])
def test_a_batch_says_what_its_rows_say_alone(name):
    """Rows of different lengths, and two questions to one reading."""
    one = subject(build(name, torch.float32))
    rows = tokens(4, 40).numpy()
    trials = [
        Trial(
            Context([row[:length]]),
            tuple(Question(part, (), 5) for part in (row[20:26], row[26:34])[: 1 + index % 2]),
        )
        for index, (row, length) in enumerate(zip(rows, (18, 20, 18, 20), strict=True))
    ]
    asked = Pass(("on",))
    together = one.ask(trials, asked, Meter())["on"]
    alone = [
        [
            one.ask([Trial(trial.context, (question,))], asked, Meter())["on"][0][0]
            for question in trial.questions
        ]
        for trial in trials
    ]
    assert together == alone
    assert [len(answers) for answers in together] == [1, 2, 1, 2]
    assert len({answer for answers in together for answer in answers}) > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mamba", "mamba2"])
def test_rounding_does_not_look_like_a_lost_state(name, dtype):
    assert subject(build(name, dtype)).reading == READINGS.get(name, Reading("segments"))


def test_logits_of_a_segment_are_not_kept():
    model = build("llama")
    one = subject(model)
    sizes = []
    model.lm_head.register_forward_hook(lambda module, given, found: sizes.append(found.shape[1]))
    one.read_contexts(contexts(tokens(2, 40)))
    assert sizes == [1] * 6


def test_a_fork_shares_keys_that_are_never_written():
    one = subject(build("llama"))
    states = one.read_contexts(contexts(tokens(1, 20)))
    first, second = (
        state[0].cache["past_key_values"].layers[0].keys for state in (states, one.fork(states))
    )
    assert first.data_ptr() == second.data_ptr()


def test_every_end_token_of_the_model_counts():
    model = build("llama")
    model.generation_config.eos_token_id = [257, 9]
    assert set(subject(model).end_ids()) == {257, 9}


def test_a_model_that_sees_later_tokens():
    with pytest.raises(UserError, match="looks at later tokens, so it is no causal"):
        subject(build("bert"))


def test_a_model_that_cannot_run():
    model = build("llama")
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(7, 7)
    with pytest.raises(UserError, match=r"a LlamaForCausalLM, cannot run here \("):
        subject(model)
    model = build("llama")
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="its logits are NaN"):
        subject(model)
