import pytest
from accelerate import Accelerator

from memlm.config import TrainConfig
from memlm.models import MemLMConfig, MemLMForCausalLM
from memlm.training.loss import RowLoss
from memlm.training.optimizer import build_optimizers
from memlm.training.row_optimizer import RowOptimizer
from memlm.training.setup import prepare

TABLE = "model.model.layers.0.ffn.module.values.weight"


@pytest.mark.parametrize("method", ["lazy_adam", "adam"])
def test_accelerate_sees_only_tables_that_are_updated_as_a_whole(monkeypatch, method):
    # It refuses to wrap models with DTensors in DDP, which tables held together are.
    ffn = {"type": "product_key", "num_keys": 6, "num_heads": 2, "top_k": 3}
    layers = [{"mixer": "attention", "ffn": ffn}]
    model = MemLMForCausalLM(MemLMConfig(vocab_size=20, hidden_size=16, layers=layers))
    row_loss = RowLoss(model)
    before = dict(row_loss.named_parameters())
    optimizers = build_optimizers(model, TrainConfig(value_optimizer=method))
    seen = {}

    def prepare_objects(self, module, *given):
        seen.update(module.named_parameters())
        assert not any(isinstance(optimizer, RowOptimizer) for optimizer in given)
        return original(self, module, *given)

    original = Accelerator.prepare
    monkeypatch.setattr(Accelerator, "prepare", prepare_objects)
    _, *prepared = prepare(Accelerator(cpu=True), row_loss, optimizers)
    assert (TABLE in seen) == (method == "adam")
    assert all(one is other for one, other in zip(prepared, optimizers, strict=True))
    after = dict(row_loss.named_parameters())
    assert after.keys() == before.keys()
    assert after[TABLE] is before[TABLE]
