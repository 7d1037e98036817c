from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedType

from memlm.config import TrainConfig
from memlm.errors import UserError
from memlm.models import MemLMConfig, MemLMForCausalLM
from memlm.training import setup
from memlm.training.loss import RowLoss
from memlm.training.optimizer import build_optimizers
from memlm.training.row_optimizer import RowOptimizer
from memlm.training.setup import build_accelerator, prepare

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


def test_fsdp_that_accelerate_leaves_out_is_no_secret(make_config, monkeypatch, capsys):
    build_accelerator(make_config())
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    device = build_accelerator(make_config()).device
    assert capsys.readouterr().err == (
        "warning: FSDP was asked for, but accelerate does not shard in 1 process(es) on "
        f"{device.type}: every process holds the whole model\n"
    )


def test_the_first_fsdp_is_refused(make_config, monkeypatch):
    kind = DistributedType.FSDP
    accelerator = SimpleNamespace(num_processes=1, distributed_type=kind, is_fsdp2=False)
    monkeypatch.setattr(setup, "Accelerator", lambda **_: accelerator)
    with pytest.raises(UserError, match="fsdp_version: 1 is not supported"):
        build_accelerator(make_config())
