"""Rotary positions against transformers' own, of every kind that does not ask for a length."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from memlm import MemLMConfig, UserError
from memlm.layers.rotary import Rotary, rotate

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
KINDS = {
    "plain": None,
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, every key": {
        **YARN,
        "attention_factor": None,
        "beta_fast": 16.0,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn, given factor": {**YARN, "attention_factor": 1.3},
}
CHANNELS, THETA = 32, 5000.0


def theirs(scaling):
    """Of transformers' Llama, whose positions are to be few: its angles are float32."""
    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": THETA}
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=2 * CHANNELS,
            num_attention_heads=2,
            head_dim=CHANNELS,
            max_position_embeddings=256,
            rope_parameters=parameters,
        )
    )


@pytest.mark.parametrize("scaling", KINDS.values(), ids=KINDS)
def test_angles_are_those_of_transformers(scaling):
    rotary, reference = Rotary.scaled(CHANNELS, THETA, scaling), theirs(scaling)
    positions = torch.arange(128)[None]
    expected = reference(torch.zeros(1), positions)
    for found, other in zip(rotary.angles(positions, torch.float32), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=2e-5, atol=2e-5)
    # Far away from the start the float64 angles of the same frequencies still hold.
    far = torch.tensor([10**6 + 1])
    frequencies = reference.inv_freq.double()
    if scaling is None or scaling["rope_type"] == "default":
        frequencies = THETA ** (-torch.arange(0, CHANNELS, 2).double() / CHANNELS)
    cos, sin = rotary.angles(far, torch.float64)
    angles = torch.cat([far * frequencies] * 2)
    torch.testing.assert_close(cos[0], angles.cos() * reference.attention_scaling)
    torch.testing.assert_close(sin[0], angles.sin() * reference.attention_scaling)


def test_stretched_frequencies_are_made_for_real_under_a_meta_device_and_in_inference():
    rotary = Rotary.scaled(CHANNELS, THETA, {"rope_type": "linear", "factor": 7.0})
    with torch.device("meta"), torch.inference_mode():
        assert rotary.angles(torch.arange(3, device="cpu"), torch.float32)[0].device.type == "cpu"
        assert rotary.angles(torch.arange(3), torch.float32)[0].device.type == "meta"
    x = torch.randn(3, 1, CHANNELS, requires_grad=True)
    rotate(x, *rotary.angles(torch.arange(3), x.dtype)).sum().backward()
    assert x.grad.isfinite().all()


def test_channels_behind_the_turned_ones_stay():
    x = torch.randn(2, 5, 3, 10, dtype=torch.float64, requires_grad=True)
    angles = Rotary(4, 100.0).angles(torch.arange(5).expand(2, -1), x.dtype)
    turned = rotate(x, *angles)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    torch.testing.assert_close(turned[..., :4], rotate(x[..., :4], *angles))
    assert torch.autograd.gradcheck(lambda x: rotate(x, *angles), x)


BAD = [
    ({"rope_fraction": 0.0}, "rope_fraction must be in (0, 1], got 0.0"),
    ({"rope_fraction": 1.5}, "rope_fraction must be in (0, 1], got 1.5"),
    ({"rope_fraction": 0.2}, "rope_fraction 0.2 of head_dim 16 is 3 channels"),
    ({"rope_fraction": 0.01}, "is 0 channels"),
    ({"rope_theta": 0.0}, "rope_theta must be positive and finite"),
    ({"rope_scaling": {}}, "rope_type is missing (valid: default, linear, llama3, yarn)"),
    ({"rope_scaling": {"rope_type": "yarm"}}, "rope_type 'yarm' is unknown; did you mean 'yarn'"),
    ({"rope_scaling": {"rope_type": ["yarn"]}}, "is unknown"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "depend on the length of the call"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "depend on the length of the call"),
    ({"rope_scaling": {"rope_type": "linear"}}, "linear needs factor"),
    ({"rope_scaling": {"rope_type": "linear", "factr": 2.0}}, "did you mean 'factor'"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor must be a positive number"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor must be a positive number"),
    ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "more than low_freq_factor"),
    ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "llama3 needs low_freq_factor"),
    ({"rope_scaling": {**YARN, "truncate": 1}}, "truncate must be true or false"),
    ({"rope_scaling": {**YARN, "beta_fast": 0.5}}, "beta_fast must be at least beta_slow"),
    ({"rope_scaling": YARN, "rope_theta": 1.0}, "yarn needs a rope_theta above 1"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"rope_scaling": YARN, "rope": False}, "rope_scaling is given, but rope is false"),
    ({"rope_fraction": 0.5, "rope": False}, "rope_fraction is given, but rope is false"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_cannot_be_turned_is_refused_in_one_line(options, message):
    mixer = {"type": "attention", "num_heads": 2, "head_dim": 16, **options}
    with pytest.raises(UserError) as error:
        MemLMConfig.from_mapping({"hidden_size": 32, "layers": [{"mixer": mixer}]})
    assert message in str(error.value) and "layers.0.mixer" in str(error.value)
    assert "\n" not in str(error.value)


def test_stretched_frequencies_are_constants_of_a_compiled_graph():
    rotary = Rotary.scaled(CHANNELS, THETA, {**YARN, "factor": 5.0})
    compiled = torch.compile(
        lambda positions: rotary.angles(positions, torch.float32), backend="eager", fullgraph=True
    )
    for found, expected in zip(
        compiled(torch.arange(5)), rotary.angles(torch.arange(5), torch.float32), strict=True
    ):
        torch.testing.assert_close(found, expected)
