"""The loss on held-out rows."""

import pytest
import torch

from memlm.training import Trainer
from memlm.training.held_out import HeldOut
from memlm.training.row_shares import RowShares


@pytest.fixture
def two_sources(corpus, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for index in range(40):
        (other / f"{index}.txt").write_text("0123456789 " * 40 + str(index))
    return {"sources": [{"type": "text", "files": [str(place)]} for place in (corpus, other)]}


def test_losses_of_several_sources_are_told_apart(make_config, two_sources):
    trainer = Trainer(make_config(data=two_sources, evaluation_rows=8))
    found = trainer.evaluate()
    assert found.keys() == {
        "bits", "text_bits", "source/text/bits", "source/text.2/bits", "bits_per_byte",
    }  # fmt: skip
    rows = trainer.evaluation.held_out
    share = [float((batch["sources"] == 0).double().mean()) for batch in rows._rows()]
    assert 0 < sum(share) / len(share) < 1
    parts = [found["source/text/bits"], found["source/text.2/bits"]]
    assert parts[0] != pytest.approx(parts[1], abs=1e-3)
    assert min(parts) < found["bits"] < max(parts)


def test_one_source_has_no_loss_of_its_own(make_config):
    trainer = Trainer(make_config(evaluation_rows=8))
    assert trainer.evaluate().keys() == {"bits", "text_bits", "bits_per_byte"}


def test_the_loss_does_not_depend_on_the_batches(make_config, two_sources):
    trainer = Trainer(make_config(data=two_sources, evaluation_rows=8))
    whole = trainer.evaluate()
    dataset, options = trainer.evaluation.held_out.dataset, trainer.options
    options.micro_batch_rows = 3
    parts = HeldOut(dataset, options, trainer.accelerator, trainer.shares)
    assert [len(batch["labels"]) for batch in parts._rows()] == [3, 3, 2]
    assert parts.evaluate(trainer.plain_loss) == pytest.approx(whole, abs=1e-5)


def test_a_process_has_its_share_in_passes_as_large_as_those_of_training(make_config):
    trainer = Trainer(make_config(evaluation_rows=7))  # four rows a step
    dataset = trainer.evaluation.held_out.dataset
    found = []
    for process in (0, 1):
        shares = RowShares(2, process)
        found += HeldOut(dataset, trainer.options, trainer.accelerator, shares)._rows()
    assert [len(batch["labels"]) for batch in found] == [2, 2, 2, 2]
    rows = torch.cat([batch["input_ids"] for batch in found])
    assert torch.equal(rows, dataset.batch(range(8))["input_ids"])
