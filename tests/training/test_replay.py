import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, GPT2Config

from memlm import attach_memory
from memlm.config import TrainConfig
from memlm.errors import UserError
from memlm.models.documents import PositionState
from memlm.training import Trainer
from memlm.training.logs import METRICS_FILE, read_metrics
from memlm.training.loss import RowLoss
from memlm.training.replay import row_passes
from tests.memory.contract import cases
from tests.memory.law_tools import ATTENTION, VOCABULARY, build_model
from tests.memory.processes import run_processes
from tests.models.attach_tools import MEMORIES, SIZES, attached, trained
from tests.training.launching import launch_sharded
from tests.training.replay_tools import (
    LENGTH,
    SCALE,
    SEGMENT,
    Chained,
    assert_same_run,
    gradient_error,
    make_batch,
    passes_of,
    run,
)

GATED_DELTA = {"type": "gated_delta", "num_heads": 2, "head_dim": 8}
LAYERS = [{"repeat": 2, "mixer": ATTENTION, "memory": GATED_DELTA, "ffn": "swiglu"}]
CASES = cases()


def first_of_each(spec=True):
    """Every spec, or every memory, at its first site; slow ones are left to the slow tests."""
    found = {(case.memory, spec and case.spec.label): case for case in reversed(CASES)}
    return [
        pytest.param(case, id=str(case), marks=[pytest.mark.slow] if case.spec.slow else [])
        for case in found.values()
    ]


def after_an_update(model):
    """What lanes carry into a step: states of rows that were read with other weights."""
    batch = make_batch(seed=1)
    _, states = passes_of(model).forward(batch, None, SCALE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return states


# --- the same gradients ---


@pytest.mark.parametrize("case", first_of_each())
def test_gradients_are_those_of_one_graph_through_the_row(case):
    # In float64, with documents that begin anywhere and states from before.
    model = case.build()
    states = after_an_update(model)
    batch = make_batch(packed=True, first=LENGTH)
    expected = run(model, passes_of(model), batch, states)
    actual = run(model, passes_of(model, SEGMENT), batch, states)
    assert_same_run(actual, expected, 1e-9)
    # The states that are carried on may differ where nobody looks, but not in what they mean.
    later, further = make_batch(first=14, seed=2), passes_of(model)
    losses = [further.forward(later, states, SCALE)[0] for _, states, _ in (actual, expected)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", first_of_each(spec=False))
def test_gradients_in_single_precision(case):
    model = case.build(torch.float32, **case.spec.stable)
    batch = make_batch()
    expected = run(model, passes_of(model), batch)
    assert_same_run(run(model, passes_of(model, SEGMENT), batch), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("segment", [1, 4, 13, LENGTH])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_at_every_site_and_for_any_segment(case, segment):
    model = case.build()
    for packed in (False, True):
        batch = make_batch(packed=packed)
        expected = run(model, passes_of(model), batch)
        assert_same_run(run(model, passes_of(model, segment), batch), expected, 1e-9)


@pytest.mark.parametrize("memory", ["gated_delta", "knn_cache", "min_lstm", "titans", None])
def test_what_flows_through_the_states_matters(memory):
    # Otherwise equal gradients would prove nothing.
    found = [case for case in CASES if case.memory == memory]
    model = found[0].build() if found else build_model([{"mixer": ATTENTION, "ffn": "swiglu"}])
    batch = make_batch()
    expected = run(model, passes_of(model), batch)
    replayed = passes_of(model, SEGMENT)
    replayed.row_loss = nothing_flows_back(replayed.row_loss)
    cut = run(model, replayed, batch)
    torch.testing.assert_close(cut[0], expected[0])
    assert gradient_error(cut[2], expected[2]) > 1e-3


def nothing_flows_back(row_loss):
    def call(*args, state_gradients=None, **kwargs):
        gradients = None if state_gradients is None else {}
        return row_loss(*args, state_gradients=gradients, **kwargs)

    return call


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_memory_of_a_pretrained_model(family):
    # Of two attentions: keys and values of the whole row are handed on, or those in a window.
    model = attached(family, "knn_cache").double()
    batch = make_batch(packed=True)
    expected = run(model, passes_of(model), batch)
    assert expected[2] and not any("embed" in name for name in expected[2])
    assert_same_run(run(model, passes_of(model, SEGMENT), batch), expected, 1e-9)


def test_dropout_is_the_same_in_both_runs():
    base = AutoModelForCausalLM.from_config(GPT2Config(**SIZES))
    memory = {"type": "gated_delta", **MEMORIES["gated_delta"]}
    model = trained(attach_memory(base, {"memory": memory, "layers": [0, 2]})).double().train()
    batch, results, ends = make_batch(), [], []
    for passes in (Chained(model, SEGMENT), passes_of(model, SEGMENT)):
        torch.manual_seed(3)
        results.append(run(model, passes, batch))
        ends.append(torch.rand(()))
    assert_same_run(results[1], results[0], 1e-9)
    assert ends[0] == ends[1]
    torch.manual_seed(4)
    assert gradient_error(run(model, passes, batch)[2], results[0][2]) > 0.01


def test_running_statistics_move_once():
    # The normalisation is over the tokens of a segment here: of a whole row it would differ.
    plain = {"type": "product_key", "num_keys": 6, "num_heads": 2, "top_k": 3, "variant": "plain"}
    ffn = {**plain, "value_size": 12, "query_norm": "batch"}
    batch, results, statistics = make_batch(rows=1, length=15), [], []
    for make in (Chained, passes_of):
        model = build_model([{"mixer": ATTENTION, "ffn": ffn}]).train()
        # Segments of 7, 7 and 1: the normalisation of a single token is by running statistics.
        results.append(run(model, make(model, SEGMENT), batch))
        statistics.append(dict(model.named_buffers()))
    assert_same_run(results[1], results[0], 1e-9)
    assert statistics[0]
    for name, buffer in statistics[0].items():
        assert torch.equal(buffer, statistics[1][name]), name


def test_padding_alone_in_the_last_segments():
    model = build_model(LAYERS)
    batch = make_batch()
    batch["segment_ids"][:, 10:] = 0
    batch["labels"][:, 10:] = -100
    expected = run(model, passes_of(model), batch)
    assert_same_run(run(model, passes_of(model, 5), batch), expected, 1e-9)


# --- beside other ways to save ---


def test_gradient_checkpointing_inside_a_segment():
    model, batch = build_model(LAYERS), make_batch(packed=True)
    expected = run(model, passes_of(model), batch)
    model.train().gradient_checkpointing_enable()
    assert_same_run(run(model, passes_of(model, SEGMENT), batch), expected, 1e-9)


def test_bf16_autocast():
    model, batch = build_model(LAYERS, torch.float32), make_batch()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    expected = run(model, Chained(model, SEGMENT, accelerator), batch)
    actual = run(model, passes_of(model, SEGMENT, accelerator), batch)
    # Every product is rounded to bf16, but gradients of states that are float32 stay so.
    assert gradient_error(actual[2], expected[2]) < 1e-6
    torch.testing.assert_close(actual[0], expected[0])


def losses(config):
    return [r["loss"] for r in read_metrics(config.output_dir / METRICS_FILE)]


@pytest.mark.parametrize("carry_state", [False, True])
def test_training_takes_the_same_steps(make_config, corpus, carry_state):
    options = {
        "model": {"layers": LAYERS},
        "carry_state": carry_state,
        "micro_batch_rows": 3,
        "loss_weights": {"text": 1.0, "answer": 0.5},
    }
    if not carry_state:
        passkey = {"type": "passkey", "digits": [2, 2], "queries": [1, 1], "files": [str(corpus)]}
        options["data"] = {"sources": [passkey]}
    trainers = [
        Trainer(make_config("whole", **options)),
        Trainer(make_config("replayed", backprop="replay", replay_segment=24, **options)),
    ]
    for trainer in trainers:
        trainer.run()
    assert losses(trainers[1].config) == pytest.approx(losses(trainers[0].config), abs=1e-5)
    for name, tensor in trainers[0].model.state_dict().items():
        assert torch.allclose(tensor, trainers[1].model.state_dict()[name], atol=1e-4), name


def test_reads_of_tables_are_counted_once(make_config):
    # Per slot 16 reads of a step, and records of them at every step.
    ffn = {"type": "product_key", "num_keys": 8, "num_heads": 2, "top_k": 4}
    mixer = {"type": "sliding_attention", "window": 16, "num_heads": 2}
    options = {"model": {"layers": [{"mixer": mixer, "ffn": ffn}]}, "value_optimizer": "lazy_adam"}
    whole = make_config("whole", steps=3, **options)
    replayed = make_config("again", steps=3, backprop="replay", replay_segment=16, **options)
    reads = []
    for config in (whole, replayed):
        Trainer(config).run()
        records = read_metrics(config.output_dir / METRICS_FILE)
        reads.append([record["layers.0.ffn.reads_per_slot"] for record in records])
    assert reads[0] == reads[1] == [256 * 2 * 4 / 64] * 3
    assert losses(replayed) == pytest.approx(losses(whole), abs=1e-5)


# --- processes ---


class LateModel(nn.Module):
    """A recurrence with a weight that only later segments use, on every process."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.first = nn.Parameter(torch.randn(8))
        self.late = nn.Parameter(torch.randn(8))

    def forward(self, input_ids, memory_states=None, **kwargs):
        x = self.embedding(input_ids)
        x = x * (self.first if memory_states is None else self.late)
        if memory_states is not None:
            x = x + memory_states["sum"].next_position[:, None]
        after = {"sum": PositionState(x.cumsum(1)[:, -1].tanh())}
        return SimpleNamespace(logits=x.cumsum(1) @ self.embedding.weight.T, memory_states=after)


MODELS = {"gated_delta": lambda: build_model(LAYERS), "late": lambda: LateModel().double()}


def replay_on_a_share(name):
    """Gradients of two micro-batches of a row each, and how often each was reduced."""
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        ACCELERATE_USE_CPU="true",
    )
    handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[handler])
    assert accelerator.num_processes == count
    model = MODELS[name]()
    passes = passes_of(model, SEGMENT, accelerator)
    reductions = []

    def reduce(state, bucket):
        reductions.append(bucket.index())
        future = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / count)

    passes.row_loss.register_comm_hook(None, reduce)
    batch = make_batch(rows=4)
    for index in range(2):
        part = {key: rows[[2 * rank + index]] for key, rows in batch.items()}
        with accelerator.no_sync(passes.row_loss) if index == 0 else torch.enable_grad():
            passes.forward(part, None, SCALE * count)
            passes.backward()
    assert len(reductions) == len(set(reductions)) > 0
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_reduce_once(name):
    model = MODELS[name]()
    batch = make_batch(rows=4)
    # The late model tells segments apart, so that the one graph has to as well.
    expected = run(model, Chained(model, SEGMENT), batch)[2]
    for gradients in run_processes(2, replay_on_a_share, name):
        assert gradient_error(gradients, expected) < 1e-9


@pytest.mark.slow
def test_sharded_weights(make_config):
    options = {"model": {"layers": LAYERS}, "micro_batch_rows": 1, "learning_rate": 3e-2}
    whole = make_config("whole", **options)
    sharded = make_config("sharded", backprop="replay", replay_segment=24, **options)
    Trainer(whole).run()
    launch_sharded(sharded)
    assert losses(sharded) == pytest.approx(losses(whole), abs=1e-5)


# --- what it costs ---


class Box:
    """A tensor that a graph holds."""

    def __init__(self, tensor):
        self.tensor = tensor


class Saved:
    """Bytes that graphs hold, and the most of them at a time."""

    def __init__(self):
        self.bytes = self.most = 0

    def pack(self, tensor):
        box = Box(tensor.detach())  # a graph that holds its own output would never die
        size = tensor.numel() * tensor.element_size()
        self.bytes += size
        self.most = max(self.most, self.bytes)
        weakref.finalize(box, self.free, size)
        return box

    def free(self, size):
        self.bytes -= size


def most_saved(model, segment, length):
    saved = Saved()
    with saved_tensors_hooks(saved.pack, lambda box: box.tensor):
        run(model, passes_of(model, segment), make_batch(length=length))
    return saved.most


@pytest.mark.parametrize("memory", [GATED_DELTA, {"type": "min_lstm"}])
def test_graphs_hold_one_segment_however_long_the_row(memory):
    model = build_model([{"mixer": ATTENTION, "memory": memory, "ffn": "swiglu"}], torch.float32)
    short, long = (most_saved(model, 8, length) for length in (24, 128))
    assert long <= 1.01 * short
    assert most_saved(model, None, 128) > 8 * long
    assert most_saved(model, None, 8) > 0.5 * long


def test_kept_states_hold_nothing_else():
    model = build_model(LAYERS)
    passes = passes_of(model, SEGMENT)
    passes.forward(make_batch(), None, SCALE)
    kept = [segment.states for segment in passes._kept]
    assert len(kept) == 3 and kept[0] is None
    for states in kept[1:]:
        for state in states.values():
            for tensor in state.tensors().values():
                assert not tensor.requires_grad
                assert tensor.untyped_storage().nbytes() <= tensor.nbytes
    passes.backward()
    assert not passes._kept


def test_n_segments_take_2n_minus_1_forward_passes():
    model = build_model(LAYERS)
    for segment, expected in ((LENGTH, 1), (13, 3), (SEGMENT, 7)):
        calls = []
        handle = model.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        run(model, passes_of(model, segment), make_batch())
        handle.remove()
        assert len(calls) == expected


MEASURE = """
import json, resource, sys, time
import torch
from tests.memory.law_tools import build_model
from tests.training.replay_tools import make_batch, passes_of, run
segment = int(sys.argv[1]) or None
torch.manual_seed(0)
mixer = {"type": "sliding_attention", "window": 128, "num_heads": 2}
memory = {"type": "gated_delta", "num_heads": 2, "head_dim": 8}
layers = [{"repeat": 4, "mixer": mixer, "memory": memory, "ffn": "swiglu"}]
model = build_model(layers, torch.float32)
passes = passes_of(model, segment)
run(model, passes, make_batch(length=256))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
run(model, passes, make_batch(length=int(sys.argv[2])))
seconds = time.perf_counter() - start
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, seconds]))
"""


def measure(segment, length):
    """Growth of the peak memory in KiB, and seconds."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(segment), str(length)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_process_needs_the_memory_of_a_segment():
    whole, replayed = measure(0, 16384), measure(1024, 16384)
    print("whole", whole, "replayed", replayed)
    assert replayed[0] < whole[0] / 4
    assert replayed[1] < 2 * whole[1]


# --- what cannot be ---


def test_options_that_do_not_fit():
    with pytest.raises(UserError, match="train.replay_segment: None does not fit.*replay needs"):
        TrainConfig(backprop="replay")
    with pytest.raises(UserError, match="train.replay_segment: 64 does not fit.*truncated"):
        TrainConfig(replay_segment=64)
    with pytest.raises(UserError, match="train.replay_segment: must be at least 1, got 0"):
        TrainConfig(backprop="replay", replay_segment=0)


def test_other_launchers_are_refused():
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, is_fsdp2=False)
    options = TrainConfig(backprop="replay", replay_segment=64)
    with pytest.raises(UserError, match="replay does not work under DEEPSPEED.*DDP or FSDP2"):
        row_passes(options, accelerator, RowLoss(nn.Identity()))
