import pytest
import torch
from torch.nn import functional as F

from memlm.models import MemLMConfig, MemLMForCausalLM
from memlm.training.loss import RowLoss, group_coefficients, group_counts


@pytest.fixture
def batch():
    torch.manual_seed(0)
    labels = torch.randint(0, 20, (2, 12))
    labels[0, 3:6] = -100
    return {
        "input_ids": torch.randint(0, 20, (2, 12)),
        "segment_ids": torch.ones(2, 12, dtype=torch.int64),
        "position_ids": torch.arange(12).expand(2, -1),
        "labels": labels,
        "loss_groups": torch.randint(0, 2, (2, 12)),
    }


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = [{"mixer": {"type": "attention", "num_heads": 2}, "ffn": "swiglu"}]
    return MemLMForCausalLM(MemLMConfig(vocab_size=20, hidden_size=16, layers=layers))


def test_sums_belong_to_their_groups(model, batch):
    loss, sums, states = RowLoss(model)(batch)
    assert states is None and not sums.requires_grad
    assert torch.allclose(loss, sums.sum())
    logits = model(batch["input_ids"], use_cache=False).logits
    for group in (0, 1):
        mask = (batch["loss_groups"] == group) & (batch["labels"] != -100)
        expected = F.cross_entropy(logits[mask], batch["labels"][mask], reduction="sum")
        assert torch.allclose(sums[group], expected, rtol=1e-5)
        assert group_counts(batch)[group] == mask.sum()


def test_returned_states_carry_no_gradient(model, batch):
    *_, states = RowLoss(model)(batch, carry=True)
    tensors = [tensor for state in states.values() for tensor in state.tensors().values()]
    assert tensors
    assert not any(tensor.requires_grad for tensor in tensors)


def test_coefficients_make_means():
    counts = torch.tensor([6, 2])
    sums = torch.tensor([3.0, 5.0])
    assert (sums * group_coefficients(counts, None)).sum() == pytest.approx(8 / 8)
    weights = {"text": 1.0, "answer": 0.5}
    assert (sums * group_coefficients(counts, weights)).sum() == pytest.approx(3 / 6 + 0.5 * 5 / 2)
    assert group_coefficients(counts, {"answer": 1.0}).tolist() == [0.0, 0.5]
    # A group without targets has a sum of zero and takes no part.
    assert torch.isfinite(group_coefficients(torch.tensor([4, 0]), weights)).all()
    assert torch.isfinite(group_coefficients(torch.tensor([0, 0]), None)).all()


def test_telling_sources_apart_changes_no_gradient(model, batch):
    weights = {"text": 1.0, "answer": 0.5}

    def run(sources, rows):
        model.zero_grad()
        counts = group_counts(rows, sources)
        scale = group_coefficients(counts, weights)
        loss, sums, _ = RowLoss(model, sources)(rows, scale=scale)
        loss.backward()
        return loss, [p.grad.clone() for p in model.parameters()], sums.view(sources, 2), counts

    told = batch | {"sources": torch.tensor([[2], [0]]).expand(2, 12)}
    loss, gradients, sums, counts = run(3, told)
    plain_loss, plain_gradients, plain_sums, plain_counts = run(1, batch)
    assert torch.allclose(loss, plain_loss) and torch.allclose(sums.sum(0), plain_sums[0])
    assert torch.equal(counts.view(3, 2).sum(0), plain_counts)
    for mine, other in zip(gradients, plain_gradients, strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-7)
    assert sums[1].tolist() == [0, 0] and (sums[[0, 2]] > 0).all()
    # Rows of data that are not told apart, as held-out ones, are summed by group alone.
    assert torch.allclose(RowLoss(model, 3)(batch)[1], plain_sums[0])
