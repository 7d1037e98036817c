"""Tiny models of other libraries, and how close two models are."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

Tensors = dict[str, Tensor]


def perturbed(model: nn.Module) -> nn.Module:
    """Off its start values, norms and biases too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def read_tensors(folder: Path) -> Tensors:
    """All tensors of a folder's safetensors files."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same_tensors(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, bit by bit."""
    found, expected = read_tensors(folder), read_tensors(other)
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in expected.items()
    )


@torch.no_grad()
def check_same(ours: PreTrainedModel, theirs: PreTrainedModel, ids: Tensor) -> None:
    """Logits, also beside padding on the left, the loss, and 64 greedy tokens are the same."""
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    # Padded rows may count positions from the padding: rotary attention knows differences only.
    found = ours(ids, attention_mask=mask).logits[mask == 1]
    assert relative_error(found, theirs(ids, attention_mask=mask).logits[mask == 1]) <= 2e-5
    labelled = [model(ids, labels=ids).loss for model in (ours, theirs)]
    torch.testing.assert_close(*labelled, atol=2e-5, rtol=2e-5)
    options = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = ids[:, :9]
    assert torch.equal(ours.generate(prompt, **options), theirs.generate(prompt, **options))
