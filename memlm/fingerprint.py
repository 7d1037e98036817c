"""One number for a set of tensors: what tells one set of weights from another."""

import hashlib
import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

_BLOCK_BYTES = 1 << 24


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, as 64 hexadecimal digits.

    Equal for equal values: neither the order of the mapping, the device nor the strides of a
    tensor count. Tensors are read a block at a time.

    Args:
        tensors: dense tensors of any dtype by name, such as a `state_dict()`.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        header = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(json.dumps(header).encode())
        for block in _blocks(tensor):
            flat = block.cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Parts of at most `_BLOCK_BYTES`, in the order of the elements."""
    if tensor.nbytes <= _BLOCK_BYTES or tensor.ndim == 0:
        yield tensor
    elif len(tensor) == 1:
        yield from _blocks(tensor[0])
    else:
        rows = max(_BLOCK_BYTES // (tensor.nbytes // len(tensor)), 1)
        for part in tensor.split(rows):
            yield from _blocks(part)
