"""Mistral as transformers has it (Jiang et al. 2023, arXiv 2310.06825), in both directions."""

from typing import Any

from memlm.models.configuration import MemLMConfig
from memlm.models.interop.architecture import Architecture
from memlm.models.interop.llama import HEADS, decoder_rules, read_decoder, write_decoder
from memlm.models.interop.our_config import ATTENTION, OurConfig, attention, grouped
from memlm.models.interop.their_config import TheirConfig, written


def _read_config(config: dict[str, Any]) -> dict[str, Any]:
    theirs = TheirConfig(config)
    values, heads = read_decoder(theirs)
    mixer = attention(theirs.take("sliding_window"), **heads)
    theirs.finish()
    layers = [{"mixer": mixer, "ffn": "swiglu"}] * theirs.take("num_hidden_layers")
    return values | {"layers": grouped(layers)}


def _write_config(config: MemLMConfig) -> dict[str, Any]:
    ours = OurConfig(config, "mistral")
    ours.plain_layers(*ATTENTION)
    spec = ours.same(ours.mixers(*ATTENTION))
    ours.only("layer 0.mixer", spec, *HEADS, "window")
    values = write_decoder(ours, spec, 0)
    values["sliding_window"] = spec.window
    return written("mistral", values | {"architectures": ["MistralForCausalLM"]})


MISTRAL = Architecture("mistral", _read_config, decoder_rules, _write_config)
