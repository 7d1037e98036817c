"""Rows of a lane, read one after the other with carried states, are the documents read alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from memlm.data import ByteTokenizer, DataConfig, PackedDataset
from memlm.models import MemLMConfig, MemLMForCausalLM

LAYERS = [
    {"mixer": {"type": "sliding_attention", "window": 8, "num_heads": 2}, "memory": "gated_delta"},
    {"mixer": {"type": "gated_delta", "num_heads": 2}},
]


@pytest.mark.parametrize("kind", ["text", "hub"])
@pytest.mark.parametrize("carry", [True, False])
@torch.no_grad()
def test_a_token_sees_its_document_and_no_other(kind: str, carry: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    for number in range(12):
        letters = rng.choice([*"abcdefgh"], size=rng.integers(1, 60))
        (tmp_path / f"{number:02}.txt").write_text("".join(letters))
    source = {"type": "text", "files": [str(tmp_path)]}
    if kind == "hub":
        # One document a line where the library reads text files.
        source = {"type": "hub", "dataset": str(tmp_path)}
    lanes = 2 if carry else 1
    data = PackedDataset(
        DataConfig(sources=[source], validation_fraction=0.0, carry=carry),
        ByteTokenizer(),
        "train",
        length=16,
        lanes=lanes,
    )
    model = MemLMForCausalLM(MemLMConfig(vocab_size=259, hidden_size=16, layers=LAYERS))
    model.double().eval()
    states, rows, found = None, [], []
    for step in range(10):
        batch = data.batch([step * lanes + lane for lane in range(lanes)])
        out = model(
            batch["input_ids"],
            segment_ids=batch["segment_ids"],
            position_ids=batch["position_ids"],
            memory_states=states,
            return_memory_states=True,
            use_cache=False,
        )
        states = out.memory_states if carry else None
        rows.append(batch)
        found.append(out.logits)
    tokens, positions, segments = (
        torch.cat([batch[name] for batch in rows], dim=1)
        for name in ("input_ids", "position_ids", "segment_ids")
    )
    logits = torch.cat(found, dim=1)
    longest = 0
    for lane in range(lanes):
        starts = torch.nonzero(positions[lane] == 0).flatten().tolist()
        for begin, end in zip(starts, [*starts[1:], tokens.shape[1]], strict=True):
            alone = model(tokens[lane : lane + 1, begin:end], use_cache=False).logits[0]
            assert torch.allclose(logits[lane, begin:end], alone, atol=1e-9)
            longest = max(longest, end - begin)
    assert segments.max() > 1
    # Carried documents are longer than rows and windows.
    assert longest > 16 if carry else longest <= 16
