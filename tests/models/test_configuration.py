"""A configuration is checked strictly, in one clear line with the nearest valid name."""

import json

import pytest

from memlm import MemLMConfig, UserError
from memlm.models.configuration import LayerPlan


def config(**pattern):
    return MemLMConfig.from_mapping({"hidden_size": 32, "layers": [pattern]})


def test_default_is_a_small_transformer():
    plan = MemLMConfig().plan()
    assert [entry.mixer[0] for entry in plan] == ["attention", "attention"]
    assert all(entry.ffn[0] == "swiglu" and entry.memory is None for entry in plan)


@pytest.mark.parametrize(("hidden_size", "expected"), [(128, 384), (192, 512), (768, 2048)])
def test_feed_forward_width_is_eight_thirds_rounded_up_to_64(hidden_size, expected):
    assert MemLMConfig(hidden_size=hidden_size).intermediate_size == expected


def test_pattern_is_repeated_and_values_reach_the_plan():
    values = {
        "hidden_size": 32,
        "layers": [
            {"repeat": 3, "mixer": {"type": "sliding_attention", "window": 8}, "norm": "post"},
            {"ffn": {"type": "swiglu", "intermediate_size": 48}},
        ],
    }
    built = MemLMConfig.from_mapping(values)
    plan = built.plan()
    assert built.num_hidden_layers == len(plan) == 4
    assert [entry.norm for entry in plan] == ["post", "post", "post", "pre"]
    assert plan[0].mixer[1].window == 8 and plan[0].ffn is None
    assert isinstance(plan[3], LayerPlan) and plan[3].ffn[1].intermediate_size == 48


def test_whole_number_is_accepted_for_a_float():
    built = config(mixer={"type": "attention", "rope_theta": 500000})
    assert built.plan()[0].mixer[1].rope_theta == 500000.0


def test_survives_saving_and_loading(tmp_path):
    memory = {"type": "gated_delta", "num_heads": 2, "head_dim": 8}
    built = config(mixer="attention", memory=memory, ffn="swiglu", norm="sandwich")
    built.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["layers"] == built.layers
    loaded = MemLMConfig.from_pretrained(tmp_path)
    assert loaded.plan() == built.plan()
    assert (loaded.layers, loaded.hidden_size) == (built.layers, built.hidden_size)


BAD_VALUES = [
    ({"hiden_size": 32}, "model: unknown key 'hiden_size'; did you mean 'hidden_size'"),
    ({"hidden_size": "wide"}, "hidden_size"),
    ({"vocab_size": 1.5}, "vocab_size"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ({"layers": []}, "at least one pattern"),
    ({"layers": ["attention"]}, "layers.0: expected a mapping"),
    ({"layers": "attention"}, "layers"),
]


@pytest.mark.parametrize(("values", "message"), BAD_VALUES)
def test_bad_model_values(values, message):
    with pytest.raises(UserError) as error:
        MemLMConfig.from_mapping(values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


BAD_PATTERNS = [
    ({"mixr": "attention"}, "layers.0: unknown key 'mixr'; did you mean 'mixer'"),
    ({"mixer": "atention"}, "unknown mixer 'atention'; did you mean 'attention'"),
    ({"memory": "gated_dleta"}, "unknown memory 'gated_dleta'; did you mean 'gated_delta'"),
    ({"memory": "swiglu"}, "layers.0.memory: unknown memory 'swiglu'"),
    ({"ffn": "swigl"}, "unknown ffn 'swigl'; did you mean 'swiglu'"),
    ({"mixer": 3}, "layers.0.mixer: expected a name or a mapping with `type: NAME`, got 3"),
    ({"mixer": {"window": 8}}, "expected a name or a mapping"),
    ({"mixer": {"type": "attention", "num_head": 2}}, "did you mean 'num_heads'"),
    ({"mixer": {"type": "attention", "num_heads": "two"}}, "num_heads"),
    ({"mixer": {"type": "attention", "rope": 1}}, "rope"),
    ({"memory": {"type": "gated_delta", "head_dims": 8}}, "did you mean 'head_dim'"),
    ({"memory": {"type": "gated_delta", "gate": "open"}}, "gate"),
    ({"mixer": "attention", "repeat": 0}, "layers.0.repeat"),
    ({"mixer": "attention", "repeat": True}, "layers.0.repeat"),
    ({"mixer": "attention", "norm": "preh"}, "'preh' is not one of pre, post, sandwich"),
    ({"repeat": 2}, "a layer needs a mixer, a memory or an ffn"),
]


@pytest.mark.parametrize(("pattern", "message"), BAD_PATTERNS)
def test_bad_patterns(pattern, message):
    with pytest.raises(UserError) as error:
        config(**pattern)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


IMPOSSIBLE = [
    ({"num_heads": 5}, "hidden_size 32 is not a multiple of num_heads 5"),
    ({"num_heads": 4, "num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
    ({"num_heads": 2, "head_dim": 5}, "even head_dim"),
    ({"num_heads": 0}, "num_heads must be at least 1"),
    ({"window": 0}, "window must be at least 1"),
    ({"conv_size": 0}, "conv_size must be at least 1"),
]


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE)
def test_impossible_attention_sizes(options, message):
    with pytest.raises(UserError, match="layers.0.mixer") as error:
        config(mixer={"type": "sliding_attention", **options})
    assert message in str(error.value)


def test_odd_head_size_is_fine_without_rotary_positions():
    mixer = {"type": "attention", "num_heads": 2, "head_dim": 5, "rope": False}
    assert config(mixer=mixer).plan()[0].mixer[1].head_dim == 5


def test_segment_longer_than_the_window_beside_it():
    store = {"type": "knn_cache", "segment": 16}
    with pytest.raises(UserError, match=r"segment \(16\) is longer than the attention window \(8"):
        config(mixer={"type": "sliding_attention", "window": 8}, memory=store)
    config(mixer={"type": "sliding_attention", "window": 16}, memory=store)
    config(mixer="attention", memory=store)  # full attention sees everything


def test_unknown_key_is_refused_by_the_constructor_too():
    with pytest.raises(Exception, match="did you mean 'hidden_size'"):
        MemLMConfig(hidden_sizes=32)


def test_keys_that_transformers_writes_are_accepted(tmp_path):
    MemLMConfig(hidden_size=32).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["hiden_size"] = 16
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(Exception, match="did you mean 'hidden_size'"):
        MemLMConfig.from_pretrained(tmp_path)
