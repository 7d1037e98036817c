import hashlib

import pytest
import torch

from memlm import fingerprint as module
from memlm.fingerprint import fingerprint
from tests.memory.processes import run_processes


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(5, 7, generator=generator),
        "b": torch.arange(6, dtype=torch.int64),
        "c": torch.tensor(2.0, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
    }


def test_is_the_hash_of_headers_and_bytes():
    expected = hashlib.sha256()
    expected.update(b'["a", "float32", [2]]' + torch.tensor([1.0, 2.0]).numpy().tobytes())
    expected.update(b'["b", "int8", [1]]' + b"\x07")
    tensors = {"b": torch.tensor([7], dtype=torch.int8), "a": torch.tensor([1.0, 2.0])}
    assert fingerprint(tensors) == expected.hexdigest()


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn],
)
def test_every_dtype(dtype):
    values = torch.tensor([1.0, 0.0, 1.0])
    one = fingerprint({"w": values.to(dtype)})
    assert one == fingerprint({"w": values.to(dtype)})
    assert one != fingerprint({"w": (1 - values).to(dtype)})


def test_order_and_strides_do_not_count():
    tensors = weights()
    expected = fingerprint(tensors)
    assert fingerprint(dict(reversed(tensors.items()))) == expected
    tensors["a.weight"] = tensors["a.weight"].t().contiguous().t()
    assert not tensors["a.weight"].is_contiguous()
    assert fingerprint(tensors) == expected


def test_name_dtype_shape_and_every_value_count():
    tensors = weights()
    seen = {fingerprint(tensors)}
    seen.add(fingerprint({**tensors, "b": tensors["b"].view(torch.float64)}))
    seen.add(fingerprint({**tensors, "b": tensors["b"].view(2, 3)}))
    seen.add(fingerprint({**tensors, "empty": torch.zeros(3, 0)}))
    seen.add(fingerprint({k.replace("b", "d"): v for k, v in tensors.items()}))
    for index in range(35):
        changed = tensors["a.weight"].clone()
        changed.view(-1)[index] += 1e-3
        seen.add(fingerprint({**tensors, "a.weight": changed}))
    assert len(seen) == 40


def test_negative_zero_counts():
    assert fingerprint({"w": torch.tensor([0.0])}) != fingerprint({"w": torch.tensor([-0.0])})


@pytest.mark.parametrize("block", [1, 4, 12, 28, 64])
def test_blocks_do_not_count(monkeypatch, block):
    expected = fingerprint(weights())
    monkeypatch.setattr(module, "_BLOCK_BYTES", block)
    parts = list(module._blocks(torch.zeros(5, 7)))
    assert max(part.nbytes for part in parts) <= max(block, 4)
    assert fingerprint(weights()) == expected


def of_some_weights() -> str:
    return fingerprint({"w": torch.arange(9).view(3, 3).bfloat16()})


def test_same_in_another_process():
    assert run_processes(1, of_some_weights) == [of_some_weights()]
