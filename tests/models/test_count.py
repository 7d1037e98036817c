from pathlib import Path

import pytest
import torch

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.config import load_config
from memlm.models.count import ModelCount, count, main

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
# Of other sizes, or of a pretrained model's.
NOT_MATCHED = ("demo", "titans_needle", "attach", "retrofit")
PAPER_SIZE = [path for path in CONFIGS if path.stem not in NOT_MATCHED]


def counted(path: Path, preset: str | None = None) -> ModelCount:
    return count(MemLMConfig.from_mapping(load_config(path, preset=preset).model), length=4096)


@pytest.mark.parametrize("path", PAPER_SIZE, ids=lambda path: path.stem)
def test_configs_are_matched_within_two_percent(path: Path) -> None:
    baseline = counted(CONFIGS[0].with_name("transformer.yaml")).parameters
    assert counted(path).matched == pytest.approx(baseline, rel=0.02)


@pytest.mark.parametrize("path", PAPER_SIZE, ids=lambda path: path.stem)
def test_tiny_presets_are_tiny(path: Path) -> None:
    assert 100_000 <= counted(path, "tiny").parameters <= 300_000


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_built_model(tied: bool) -> None:
    ffn = {"type": "product_key", "num_keys": 8, "top_k": 2, "share": "table"}
    layers = [{"repeat": 2, "mixer": "attention", "memory": "gated_delta", "ffn": ffn}]
    config = MemLMConfig(hidden_size=32, layers=layers, tie_word_embeddings=tied)
    model = MemLMForCausalLM(config)
    result = count(config, length=16)

    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert result.embedding == 259 * 32 * (1 if tied else 2)
    # One table for both layers.
    assert result.value_tables == 8 * 8 * 32
    assert result.matched == result.parameters - 8 * 8 * 32
    sites = (".memory.module.", ".ffn.module.", ".shared.")
    expected = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if any(site in name for site in sites)
    )
    assert result.memory == expected


def test_flops_of_a_transformer_are_the_textbook_sum() -> None:
    layers = [{"repeat": 3, "mixer": {"type": "attention", "num_heads": 2}, "ffn": "swiglu"}]
    config = MemLMConfig(vocab_size=100, hidden_size=32, intermediate_size=64, layers=layers)
    length = 5
    matrices = 3 * (4 * 32 * 32 + 3 * 32 * 64) + 32 * 100
    # Queries see 1 + 2 + ... + length keys: scores and weighted sum.
    attention = 3 * 4 * 32 * (length * (length + 1) // 2)
    assert count(config, length).flops_per_token == 2 * matrices + attention // length


def test_state_bytes_are_those_of_a_model_that_has_read_the_row() -> None:
    layers = [
        {"mixer": {"type": "sliding_attention", "window": 8}, "ffn": "swiglu"},
        {"mixer": {"type": "attention", "num_key_value_heads": 1}, "memory": "gated_delta"},
    ]
    config = MemLMConfig(hidden_size=128, layers=layers, max_position_embeddings=64)
    model = MemLMForCausalLM(config)
    output = model(torch.zeros(1, 20, dtype=torch.long), return_memory_states=True)
    states = output.memory_states
    memory = sum(states[name].nbytes for name in model.model.memory_state_names())
    result = count(config, length=20)

    assert result.memory_state_bytes == memory > 0
    # 8 tokens of two key/value heads and 20 of one, 64 channels, float32, keys and values.
    assert result.attention_state_bytes == 2 * 4 * 64 * (8 * 2 + 20)
    full = states["1.mixer"]
    assert full.keys.nbytes + full.values.nbytes == 2 * 4 * 64 * 20


def test_an_output_memory_counts() -> None:
    sizes = {"hidden_size": 64, "layers": [{"mixer": {"type": "attention", "num_heads": 2}}]}
    cache = {"type": "neural_cache", "capacity": 10}
    alone, result = (count(MemLMConfig(**sizes, output=o), length=20) for o in (None, cache))
    assert result.parameters == alone.parameters and result.memory == 0
    assert result.flops_per_token == alone.flops_per_token + 2 * 10 * 64
    states = MemLMForCausalLM(MemLMConfig(**sizes, output=cache)).init_states(1)
    assert alone.memory_state_bytes == 0
    assert result.memory_state_bytes == states["output"].nbytes > 10 * 64 * 4


def test_the_command_prints_what_was_counted(capsys: pytest.CaptureFixture) -> None:
    path = CONFIGS[0].with_name("product_key.yaml")
    assert main([str(path), "--preset", "tiny", "--train.length", "128"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    result = count(MemLMConfig.from_mapping(load_config(path, preset="tiny").model), 128)

    assert f"parameters {result.parameters:,}" in printed
    assert f"in value tables {result.value_tables:,}" in printed
    assert f"forward, 128 tokens {result.flops_per_token:,}" in printed


def test_the_vocabulary_comes_from_the_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {hidden_size: 64}\ndata: {tokenizer: bytes}\n")
    assert main([str(path)]) == 0
    assert f"{259 * 64:,}" in capsys.readouterr().out


def test_a_mistake_is_one_line_and_exit_code_two(capsys: pytest.CaptureFixture) -> None:
    path = CONFIGS[0].with_name("transformer.yaml")
    assert main([str(path), "--model.hiden_size", "64"]) == 2
    error = capsys.readouterr().err
    assert "hidden_size" in error
    assert error.count("\n") == 1


def test_a_memory_for_a_pretrained_model_is_not_counted(capsys) -> None:
    path = CONFIGS[0].with_name("attach.yaml")
    assert main([str(path), "--preset", "tiny"]) == 2
    assert f"error: {path}: only whole models are counted" in capsys.readouterr().err
