import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memlm.evaluation.streaming import batches, score_targets, segments


@given(st.integers(2, 300), st.integers(2, 60))
def test_batches_cover_the_rows_and_leave_none_alone(count, size):
    ranges = list(batches(count, size))
    assert [row for rows in ranges for row in rows] == list(range(count))
    assert all(2 <= len(rows) <= max(size, 3) for rows in ranges)


@given(st.integers(1, 300), st.integers(1, 60))
def test_segments_cover_the_tokens(length, size):
    parts = list(segments(length, size))
    covered = [token for part in parts for token in range(length)[part]]
    assert covered == list(range(length))
    assert all(part.stop - part.start <= size for part in parts)


@pytest.mark.parametrize("logits", [1, 5000, 1 << 26])
def test_scores_do_not_depend_on_how_many_logits_are_held(gated_delta, monkeypatch, logits):
    monkeypatch.setattr("memlm.evaluation.streaming._LOGITS", logits)
    tokens = torch.randint(0, 256, (2, 41))
    targets = tokens.roll(-1, 1)
    targets[0, 30:] = -100
    targets[1, 3:9] = -100
    with torch.no_grad():
        losses, guesses, _ = score_targets(gated_delta, tokens, targets, None)
        expected = gated_delta(tokens).logits
    rows = torch.nn.functional.cross_entropy(expected.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(losses, rows, atol=1e-4, rtol=1e-4)
    asked = targets != -100
    assert torch.equal(guesses[asked], expected.argmax(-1)[asked])


def test_finished_rows_are_not_written(gated_delta):
    tokens = torch.randint(0, 256, (2, 24))
    targets = torch.randint(0, 256, (2, 24))
    targets[0, 10:] = -100
    with torch.no_grad():
        _, _, states = score_targets(gated_delta, tokens, targets, None)
        _, _, short = score_targets(gated_delta, tokens[:1, :10], targets[:1, :10], None)
    for name in gated_delta.memory_state_names():
        for field, value in short[name].tensors().items():
            torch.testing.assert_close(states[name].tensors()[field][:1], value)
    assert states["position"].next_position.tolist() == [10, 24]
