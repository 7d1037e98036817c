"""Tokens that go on behind carried ones attend as in one call, without a mask."""

from unittest import mock

import pytest
import torch

from memlm.layers import attention
from tests.memory.law_tools import VOCABULARY, build_model, run

FULL = {"type": "attention", "num_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_a_prompt_in_pieces(dtype, key_value_heads):
    mixer = {**FULL, "num_key_value_heads": key_value_heads}
    model = build_model([{"repeat": 2, "mixer": mixer, "ffn": "swiglu"}], dtype)
    ids, states, pieces = torch.randint(VOCABULARY, (2, 50)), None, []
    function = attention.continued_attention
    with mock.patch.object(attention, "continued_attention", wraps=function) as called:
        with torch.no_grad():
            whole, _ = run(model, ids)
            for piece in ids.split([17, 3, 30], 1):
                logits, states = run(model, piece, states)
                pieces.append(logits)
        assert called.call_count == 4  # in both layers, of the second and the third piece
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=tolerance, atol=tolerance)


def rows_with_padding():
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :4] = 0
    return {"attention_mask": mask}


def packed_rows():
    segments, positions = torch.ones(2, 20, dtype=torch.int64), torch.arange(20).repeat(2, 1)
    segments[0, 8:], positions[0, 8:] = 2, torch.arange(12)
    return {"segment_ids": segments, "position_ids": positions}


@pytest.mark.parametrize("first", [rows_with_padding, packed_rows])
def test_carried_keys_with_gaps_need_a_mask(first):
    model = build_model([{"mixer": FULL}])
    ids = torch.randint(1, VOCABULARY, (2, 30))
    kept = first()
    function = attention.continued_attention
    results = []
    with mock.patch.object(attention, "continued_attention", wraps=function) as called:
        for recorded in (True, False):  # with gradients there is always a mask
            with torch.set_grad_enabled(recorded):
                _, states = run(model, ids[:, :20], **kept)
                results.append(run(model, ids[:, 20:], states)[0].detach())
    assert called.call_count == 0
    torch.testing.assert_close(results[1], results[0])
