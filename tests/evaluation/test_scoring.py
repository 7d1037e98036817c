import pytest
import torch

from memlm.evaluation.conditions import make_plan
from memlm.evaluation.scoring import guess_and_score, score_targets
from memlm.evaluation.subject import MemorySubject


def _subject(model):
    return MemorySubject(model, None, make_plan(model), 64)


@pytest.mark.parametrize("logits", [1, 5000, 1 << 26])
def test_scores_do_not_depend_on_how_many_logits_are_held(gated_delta, monkeypatch, logits):
    monkeypatch.setattr("memlm.evaluation.subject._LOGITS", logits)
    tokens = torch.randint(0, 256, (2, 41))
    targets = tokens.roll(-1, 1)
    targets[0, 30:] = -100
    with torch.no_grad():
        losses, _ = score_targets(_subject(gated_delta), tokens, targets, None)
        guesses = _subject(gated_delta).guess(tokens, None)[0]
        expected = gated_delta(tokens).logits
    rows = torch.nn.functional.cross_entropy(expected.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(losses, rows, atol=1e-4, rtol=1e-4)
    assert torch.equal(guesses, expected.argmax(-1))


@pytest.mark.parametrize("logits", [1, 5000, 1 << 26])
def test_guesses_and_losses_of_one_pass(gated_delta, monkeypatch, logits):
    monkeypatch.setattr("memlm.evaluation.subject._LOGITS", logits)
    tokens, targets = torch.randint(0, 256, (2, 2, 41))
    targets[0, 5:20] = targets[:, -7] = -100
    with torch.no_grad():
        guesses, losses, states = guess_and_score(_subject(gated_delta), tokens, targets, None)
        expected = gated_delta(tokens).logits
    rows = torch.nn.functional.cross_entropy(expected.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(losses, rows, atol=1e-4, rtol=1e-4)
    assert torch.equal(guesses, expected.argmax(-1))
    # What is not asked is read all the same.
    assert states["position"].next_position.tolist() == [41, 41]


def test_finished_rows_are_not_written(gated_delta):
    subject = _subject(gated_delta)
    tokens = torch.randint(0, 256, (2, 24))
    targets = torch.randint(0, 256, (2, 24))
    targets[0, 10:] = -100
    with torch.no_grad():
        _, states = score_targets(subject, tokens, targets, None)
        _, short = score_targets(subject, tokens[:1, :10], targets[:1, :10], None)
    for name in gated_delta.memory_state_names():
        for field, value in short[name].tensors().items():
            torch.testing.assert_close(states[name].tensors()[field][:1], value)
    assert states["position"].next_position.tolist() == [10, 24]
