"""Tiny models of transformers with Gated DeltaNet beside those of ours that are read from them."""

import dataclasses
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from memlm import MemLMForCausalLM
from memlm.models.convert import main as convert
from tests.models.interop.tools import read_tensors

VOCABULARY = 50
KINDS = ["linear_attention", "linear_attention", "full_attention"]
# Two value heads for each key head, and values wider than keys.
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layer_types": KINDS,
    "tie_word_embeddings": False,
    **DELTA,
}
WIDTH = {"intermediate_size": 24}
QWEN_HEADS = {
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 500.0,
        "partial_rotary_factor": 0.5,
    },
}
EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "patch_size": 4,
}
FUNCTIONS = (
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
    "causal_conv1d_fn",
    "causal_conv1d_update",
)
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@dataclasses.dataclass
class Pair:
    """A model of transformers, the folder it was saved in, and the model of ours read from it."""

    theirs: nn.Module
    folder: Path
    ours: MemLMForCausalLM

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of both, [B, T, vocabulary]."""
        with torch.no_grad():
            expected = self.theirs(input_ids=ids, attention_mask=mask).logits
            return self.ours(ids, attention_mask=mask).logits, expected

    def generated(self, ids: Tensor, mask: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Greedy continuations by both, with the prompt."""
        options = {"attention_mask": mask, "max_new_tokens": tokens, **GREEDY}
        return self.ours.generate(ids, **options), self.theirs.generate(ids, **options)


def pair(theirs: nn.Module, folder: Path) -> Pair:
    """Save a model whose numbers are all its own, and read it."""
    plain_torch(theirs)
    randomized(theirs)
    theirs.save_pretrained(folder)
    return Pair(theirs, folder, MemLMForCausalLM.from_pretrained(folder).eval())


def plain_torch(model: nn.Module) -> None:
    """Let a model run without the kernels of other libraries, which need a GPU, where they are
    installed: transformers hands calls on to them also on a CPU."""
    module = sys.modules[type(model).__module__]
    for name in FUNCTIONS:
        setattr(module, name, inspect.unwrap(getattr(module, name)))


def randomized(model: nn.Module) -> None:
    """Move every parameter off its start value, so that none can be taken for another.

    Matrices fade slowly: where nothing is left of earlier tokens, outputs can be next to nothing,
    and their norm makes numbers of what rounding left.
    """
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):
                parameter -= 3
    model.eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(7))


def left_padded(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens, and a mask that leaves out the first ones of every row but the first."""
    ids, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.int64)
    for row in range(1, rows):
        mask[row, : 5 * row + 2] = 0
        ids[row, : 5 * row + 2] = 0
    return ids, mask


def relative_error(found: Tensor, expected: Tensor, mask: Tensor | None = None) -> float:
    """Largest difference over the largest number, of the tokens that are not padding."""
    if mask is not None:
        found, expected = found[mask == 1], expected[mask == 1]
    return float((found - expected).abs().max() / expected.abs().max())


def check_logits(both: Pair) -> None:
    """The same logits, of lengths on both sides of a chunk of 64 tokens, and with padding."""
    for length in (1, 50, 64, 101):
        found, expected = both.logits(tokens(2, length))
        assert relative_error(found, expected) <= 2e-5, length
    ids, mask = left_padded(3, 75)
    found, expected = both.logits(ids, mask)
    assert relative_error(found, expected, mask) <= 2e-5


def check_generation(both: Pair) -> None:
    """The same 64 tokens behind prompts of several lengths."""
    found, expected = both.generated(*left_padded(2, 11), 64)
    assert torch.equal(found, expected)
    assert len(set(found[0, 11:].tolist())) > 3  # it says more than one thing


def written_back(both: Pair, model_type: str, folder: Path) -> Path:
    """Save ours, and write that as theirs."""
    both.ours.save_pretrained(folder / "ours")
    target = folder / "theirs"
    assert convert([str(folder / "ours"), str(target), "--to", model_type]) == 0
    return target


def check_round_trip(
    both: Pair,
    again: Path,
    model_class: type,
    original: dict[str, Tensor] | None = None,
    same_class: bool = True,
) -> None:
    """The tensors on disk are those that were read, and transformers computes the same.

    Args:
        both: the models.
        again: the folder that was written back.
        model_class: of transformers.
        original: tensors on disk; None = those of the folder that was read.
        same_class: whether transformers has both as models of one class.
    """
    found, expected = (
        read_tensors(again),
        read_tensors(both.folder) if original is None else original,
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    loaded, info = model_class.from_pretrained(again, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    if same_class:
        assert_same_weights(loaded, both.theirs)
    plain_torch(loaded)
    ids = tokens(2, 70)
    with torch.no_grad():
        found, expected = (model.eval()(input_ids=ids).logits for model in (loaded, both.theirs))
    # Products may round otherwise where weights lie elsewhere in memory.
    assert relative_error(found, expected) <= 1e-6


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    """The same names and the same bits."""
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def count_parameters(model_class: type, config: Any) -> int:
    """Of a model of any size."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_class(config).parameters())


def with_weights(folder: Path, changed: dict[str, Tensor], target: Path) -> Path:
    """A copy of a model with other tensors."""
    target.mkdir()
    save_file(changed, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())
