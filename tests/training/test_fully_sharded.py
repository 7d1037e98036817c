"""Runs under FSDP2 begin with the weights of one process, which one process builds."""

from unittest import mock

import torch
from accelerate.state import AcceleratorState
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from memlm.training import Trainer, fully_sharded, trainer
from memlm.training.checkpoint import whole_weights
from memlm.training.setup import build_inputs
from tests.memory.processes import run_processes
from tests.training.launching import set_environment, sharded_accelerator

TABLE = {"type": "product_key", "num_keys": 7, "num_heads": 2, "top_k": 4, "query_norm": "batch"}
TITANS = {"type": "titans", "num_heads": 2, "head_dim": 8, "chunk_size": 16}
LAYER = {"mixer": {"type": "sliding_attention", "window": 16, "num_heads": 2}, "ffn": TABLE}
# Nothing that processes can share equally, a tied head, buffers, and a matrix of one row.
MODEL = {"hidden_size": 20, "intermediate_size": 33, "tie_word_embeddings": True}
LAYERS = [{**LAYER, "memory": TITANS}, {**LAYER, "memory": "min_lstm", "ffn": "swiglu"}]
CASES = {
    "whole tables": {"value_optimizer": "adam"},
    "tables by rows": {"value_optimizer": "lazy_adam"},
    "tables in columns": {"value_optimizer": "lazy_adam", "memory_parallel": 2},
    "tables in rows": {
        "value_optimizer": "lazy_adam",
        "memory_parallel": 2,
        "memory_shard": "rows",
    },
}


def start(configs):
    """What the weights of runs are before the first step, whole."""
    set_environment()
    found = []
    for config in configs:
        AcceleratorState._reset_state(reset_partial_state=True)
        empty = []

        def build(*arguments, empty=empty):
            built = build_inputs(*arguments)
            empty.extend(parameter.is_meta for parameter in built[-1].parameters())
            return built

        with (
            mock.patch.object(trainer, "build_accelerator", sharded_accelerator),
            mock.patch.object(trainer, "build_inputs", build),
            mock.patch.object(fully_sharded, "PIECE", 256),  # bytes: most tensors are cut
        ):
            run = Trainer(config)
        run.feed.close()
        assert set(empty) == {dist.get_rank() > 0}
        assert isinstance(run.model.lm_head.weight, DTensor)
        assert run.model.lm_head.weight is run.model.model.embed_tokens.weight
        held = [optimizer.param_groups for optimizer in run.optimizers]
        held = {id(one) for groups in held for group in groups for one in group["params"]}
        assert held == {id(parameter) for parameter in run.model.parameters()}
        found.append(whole_weights(run.model))
    return found


def test_weights_of_the_main_process_are_sent_in_shards(make_config):
    model = MODEL | {"layers": LAYERS}
    options = {name: {"model": model, **case} for name, case in CASES.items()}
    configs = [make_config(name, **given) for name, given in options.items()]
    found = run_processes(2, start, configs)
    for number, config in enumerate(configs):
        plain = make_config(f"one {number}", model=model)
        run = Trainer(plain)
        run.feed.close()
        expected = run.model.state_dict()
        for process in found:
            weights = process[number]
            assert weights.keys() == expected.keys(), config.output_dir
            for name, tensor in expected.items():
                assert torch.equal(weights[name], tensor), name
