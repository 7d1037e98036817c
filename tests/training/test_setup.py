import importlib.util
from types import SimpleNamespace

import pytest
import yaml
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from memlm.config import TrainConfig
from memlm.errors import UserError
from memlm.models import MemLMConfig, MemLMForCausalLM
from memlm.training import setup, zero2
from memlm.training.loss import RowLoss
from memlm.training.optimizer import build_optimizers
from memlm.training.row_optimizer import RowOptimizer
from memlm.training.setup import build_accelerator, prepare
from tests.training.launching import ROOT

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


def test_what_the_trainer_does_itself_is_refused_to_the_launcher(make_config, monkeypatch):
    plugin = SimpleNamespace(activation_checkpointing=True)
    accelerator = SimpleNamespace(
        num_processes=1,
        distributed_type=DistributedType.FSDP,
        is_fsdp2=True,
        state=SimpleNamespace(fsdp_plugin=plugin),
    )
    monkeypatch.setattr(setup, "Accelerator", lambda **_: accelerator)
    with pytest.raises(UserError, match="fsdp_activation_checkpointing .* use train.activations"):
        build_accelerator(make_config())


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero2"])
def test_accelerate_understands_the_launch_configs(monkeypatch, name):
    path = ROOT / "configs" / "accelerate" / f"{name}.yaml"
    parser = launch_command_parser()
    words = parser.parse_args(["--config_file", str(path), "train.py"])
    known = vars(words).keys()
    options, _, _ = _validate_launch_command(words)
    assert options.num_processes == 8 and options.mixed_precision == "bf16"
    assert (options.use_fsdp, options.multi_gpu) == (name == "fsdp2", name == "ddp")
    assert options.use_deepspeed == (name == "deepspeed_zero2")
    # Keys of such a section that accelerate does not know, it passes over.
    sections = yaml.safe_load(path.read_text())
    for section in ("fsdp_config", "deepspeed_config"):
        assert sections.get(section, {}).keys() <= known
    if name == "deepspeed_zero2":
        options.deepspeed_fields_from_accelerate_config = ""
        _, environment = prepare_deepspeed_cmd_env(options)
    else:
        environment = prepare_multi_gpu_env(options)
    for key, value in environment.items():
        if "FSDP" in key or "DEEPSPEED" in key:
            monkeypatch.setenv(key, value)
    assert zero2.is_asked() == (name == "deepspeed_zero2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    zero2.check(TrainConfig(), options.num_processes)
    if name == "fsdp2":
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
        assert not plugin.activation_checkpointing and not plugin.cpu_ram_efficient_loading
