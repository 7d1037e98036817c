import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from memlm.memory.records import count_updates, record_surprise
from memlm.memory.titans_memory import TitansMemory
from memlm.training import Trainer
from memlm.training.logs import METRICS_FILE, read_metrics
from memlm.training.memory_metrics import MemoryMetrics
from tests.memory.contract import OUTPUT_SPECS, SPECS, cases
from tests.memory.law_tools import Case, build_model
from tests.models.attach_tools import attached
from tests.training.replay_tools import make_batch

ONE = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
GATED, NORMED, TOLD = "gate_mean", "state_norm", "surprise"
# What each memory says of itself, by name and label of its spec.
SAID = {
    "gated_delta": {GATED, NORMED},
    "gated_delta-delta_rule": {NORMED},
    "knn_cache": {"gain_mean", "fill"},
    "lact": {NORMED},
    "linear_attention": {NORMED},
    "memorizing_attention": {GATED, "fill"},
    "min_gru": {NORMED},
    "min_lstm": {NORMED},
    "product_key": {GATED},
    "product_key-peer": set(),
    "retention": {GATED, NORMED},
    "titans": {GATED, NORMED, TOLD},
    "titans-mal-depth1": {NORMED, TOLD},
}
LABELS = ("", "delta_rule", "shared", "plain", "peer", "depth1", "mac-depth1", "mag-depth1")
SPECIFIED = [
    Case(name, spec.sites[0], spec)
    for name, specs in (SPECS | OUTPUT_SPECS).items()
    for spec in specs
    if spec.label in (*LABELS, "mal-depth1")
]


def inputs(batch):
    return {name: batch[name] for name in ("input_ids", "segment_ids", "position_ids")}


def call(model, batch, watch):
    with watch:
        output = model(**inputs(batch), return_memory_states=True, use_cache=False)
    return output.memory_states


def names_of(case):
    """Sites of the model's metrics, and what is said at each."""
    if case.site == "output":
        return {"output": {"fill"}}
    specific = "-".join(filter(None, (case.memory, case.spec.label)))
    said = SAID.get(specific, SAID.get(case.memory))
    site = "memory" if case.site == "parallel" else case.site
    names = {f"layers.{index}.{site}": set(said) for index in (0, 1)}
    if case.spec.label == "shared" and case.memory == "knn_cache":
        names[f"layers.1.{site}"].remove("fill")  # it uses the store of the first
    return names


def test_the_table_names_every_memory():
    assert {name.split("-")[0] for name in SAID} == set(SPECS)
    assert {case.memory for case in cases()} == {case.memory for case in SPECIFIED}


@pytest.mark.parametrize("case", SPECIFIED, ids=str)
def test_every_memory_says_what_it_can(case):
    model = case.build(torch.float32, **case.spec.stable).train()
    metrics = MemoryMetrics(model, ONE)
    batch = make_batch(packed=True)
    states = call(model, batch, metrics.watch())
    found = metrics.report()
    sites = names_of(case)
    assert set(found) == {f"{site}.{name}" for site, names in sites.items() for name in names}
    assert metrics.report() == {}  # nothing was watched since

    for site, names in sites.items():
        state = states.get(site.removeprefix("layers."))
        if NORMED in names:
            kept = getattr(state, "recurrent", None)
            kept = state.weights if kept is None else (kept,)
            entries = torch.cat([tensor.detach().flatten() for tensor in kept])
            assert found[f"{site}.state_norm"] == pytest.approx(
                float(entries.square().mean().sqrt()), rel=1e-5
            )
        if "fill" in names:
            share = float(state.count.sum()) / (state.capacity * 2)
            assert found[f"{site}.fill"] == pytest.approx(share) and share > 0
        if TOLD in names:
            with record_surprise(model) as records:
                call(model, batch, contextlib.nullcontext())
            (record,) = [r for name, r in records.items() if f".{site}." in name]
            tokens = record.joined()[batch["segment_ids"] != 0]
            assert found[f"{site}.surprise"] == pytest.approx(float(tokens.mean()), rel=1e-4)
        assert found.get(f"{site}.gain_mean", 1.0) == 1.0
        assert found.get(f"{site}.gate_mean", 1.0) > 0


ATTENTION = {"type": "sliding_attention", "window": 8, "num_heads": 2}
GATE_SIZES = {
    "gated_delta": (
        "g_proj",
        F.sigmoid,
        {"num_heads": 2, "head_dim": 8, "gate_activation": "sigmoid"},
    ),
    "retention": ("g_proj", F.silu, {"num_heads": 2, "head_dim": 8}),
    "titans": ("g_proj", F.silu, {"num_heads": 2, "head_dim": 8, "chunk_size": 4}),
    "product_key": ("gate_proj", F.silu, {"num_keys": 6, "num_heads": 2, "top_k": 3}),
}


@pytest.mark.parametrize("memory", GATE_SIZES)
def test_gate_mean_is_the_mean_size_of_the_gates_values(memory):
    projection, activation, options = GATE_SIZES[memory]
    site = {"ffn" if memory == "product_key" else "memory": {"type": memory, **options}}
    model = build_model([{"mixer": ATTENTION, **site}], torch.float32)
    values = []
    (module,) = [m for name, m in model.named_modules() if name.endswith(projection)]
    module.register_forward_hook(lambda *call: values.append(activation(call[2])))
    metrics = MemoryMetrics(model, ONE)
    for seed in (0, 1):  # two micro-batches, of different sizes
        call(model, make_batch(rows=1 + seed, seed=seed), metrics.watch())
    sizes = torch.cat([value.flatten() for value in values]).abs()
    (found,) = [value for name, value in metrics.report().items() if name.endswith("gate_mean")]
    assert found == pytest.approx(float(sizes.mean()), rel=1e-5)


@pytest.mark.parametrize("gate, expected", [("sigmoid", 0.25), ("tanh", 0.5)])
def test_gates_of_heads(gate, expected):
    spec = {"type": "memorizing_attention", "window": 8, "segment": 4, "capacity": 12, "top_k": 3}
    model = build_model([{"mixer": {**spec, "num_heads": 2, "head_gate": gate}}], torch.float32)
    inverse = torch.logit if gate == "sigmoid" else torch.atanh
    with torch.no_grad():
        model.model.layers[0].mixer.module.memory.head_bias.fill_(inverse(torch.tensor(expected)))
    metrics = MemoryMetrics(model, ONE)
    call(model, make_batch(), metrics.watch())
    assert metrics.report()["layers.0.mixer.gate_mean"] == pytest.approx(expected)


def test_gates_of_the_table_and_gains_of_the_branch():
    ffn = {"type": "product_key", "num_keys": 6, "top_k": 3, "gated": True, "gate": -0.5}
    model = build_model([{"mixer": ATTENTION, "ffn": ffn}], torch.float32)
    gate = model.model.layers[0].ffn.module.scalar_gate
    with torch.no_grad():
        gate.weight.zero_()
        gate.bias.fill_(-1.0)
    metrics = MemoryMetrics(model, ONE)
    call(model, make_batch(), metrics.watch())
    found = metrics.report()
    assert found["layers.0.ffn.gate_mean"] == pytest.approx(1 / (1 + torch.e), rel=1e-5)
    assert found["layers.0.ffn.gain_mean"] == 0.5


def test_what_is_not_finite_is_unknown():
    memory = {"type": "gated_delta", "num_heads": 2, "head_dim": 8}
    model = build_model([{"mixer": memory}], torch.float32)
    with torch.no_grad():
        model.model.layers[0].mixer.module.g_proj.weight.fill_(torch.inf)
    metrics = MemoryMetrics(model, ONE)
    call(model, make_batch(), metrics.watch())
    assert metrics.report()["layers.0.mixer.gate_mean"] is None
    call(model, make_batch(), metrics.watch())
    metrics.clear()
    assert metrics.report() == {}


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag"])
def test_surprise_in_a_pass_of_its_own(variant):
    """The pass that trains is left alone, and its updates are counted once."""
    options = {"num_heads": 2, "head_dim": 8, "chunk_size": 4, "variant": variant}
    if variant != "lmm":
        options |= {"window": 8, "segment": 4, "attention_heads": 2}
    model = build_model([{"mixer": {"type": "titans", **options}}], torch.float32)
    model.requires_grad_()
    batch, other = make_batch(packed=True), make_batch(seed=3)
    with record_surprise(model) as records:
        call(model, batch, contextlib.nullcontext())
    (record,) = records.values()
    expected = record.joined()[batch["segment_ids"] != 0].mean()

    seen = []
    forward = TitansMemory.forward

    def watched(self, *args):
        seen.append((torch.is_grad_enabled(), self.surprise is not None))
        return forward(self, *args)

    metrics = MemoryMetrics(model, ONE)
    with pytest.MonkeyPatch.context() as patch, count_updates(model) as updates:
        patch.setattr(TitansMemory, "forward", watched)
        call(model, batch, metrics.watch())
        (counts,) = updates.values()
        once = int(counts.read()[0])
        passes = len(seen)
        call(model, other, metrics.watch())
    assert once == int((batch["segment_ids"] != 0).sum()) * 2
    assert set(seen[:passes]) == {(True, False), (False, True)}
    assert (False, True) not in seen[passes:]  # the first micro-batch tells
    found = metrics.report()["layers.0.mixer.surprise"]
    assert found == pytest.approx(float(expected), rel=1e-5)


LAYERS = [
    {
        "mixer": {"type": "titans", "num_heads": 2, "head_dim": 8, "chunk_size": 8},
        "memory": {"type": "knn_cache", "capacity": 32, "segment": 8, "num_heads": 2},
        "ffn": {"type": "product_key", "num_keys": 6, "num_heads": 2, "top_k": 3, "gated": True},
    },
    {"mixer": {"type": "gated_delta", "num_heads": 2, "head_dim": 8}, "ffn": "swiglu"},
]


def said(config, step=1):
    """What was recorded of the memories."""
    record = read_metrics(config.output_dir / METRICS_FILE)[step - 1]
    ends = ("gate_mean", "gain_mean", "state_norm", "surprise", "fill")
    return {key: value for key, value in record.items() if key.endswith(ends)}


@pytest.mark.parametrize(
    "options",
    [
        {"activations": "recompute", "micro_batch_rows": 3},
        {"backprop": "replay", "replay_segment": 24},
    ],
)
def test_no_token_counts_twice(make_config, options):
    plain = make_config("plain", model={"layers": LAYERS}, steps=1)
    other = make_config("other", model={"layers": LAYERS}, steps=1, **options)
    Trainer(plain).run()
    Trainer(other).run()
    expected, found = said(plain), said(other)
    assert len(expected) == 8
    if "micro_batch_rows" in options:  # of which the first tells of its surprise
        told = "layers.0.mixer.surprise"
        assert found.pop(told) == pytest.approx(expected.pop(told), rel=0.1)
    assert found == pytest.approx(expected, rel=1e-4)


def test_what_is_measured_changes_nothing(make_config):
    often = make_config("often", model={"layers": LAYERS}, steps=4)
    seldom = make_config("seldom", model={"layers": LAYERS}, steps=4, log_every=4)
    first, second = Trainer(often), Trainer(seldom)
    watched = []
    watch = MemoryMetrics.watch

    def counted(self):
        watched.append(self)
        return watch(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryMetrics, "watch", counted)
        first.run()
        second.run()
    memories = [trainer.report.memories for trainer in (first, second)]
    assert [watched.count(one) for one in memories] == [4, 2]  # steps 1 and 4
    weights = first.model.state_dict()
    assert all(torch.equal(weights[name], w) for name, w in second.model.state_dict().items())
    assert said(seldom, 2) == said(often, 4)


@pytest.mark.parametrize("memory", ["knn_cache", "titans", "gated_delta"])
def test_memories_of_a_pretrained_model(memory):
    model = copy.deepcopy(attached("llama", memory))
    model.gradient_checkpointing_enable()
    metrics = MemoryMetrics(model.train(), ONE)
    batch = make_batch()
    with metrics.watch():
        output = model(**inputs(batch), labels=batch["labels"], use_cache=False)
    found = metrics.report()
    output.loss.backward()
    assert metrics.report() == {}
    sites = {name.rpartition(".")[0] for name in found}
    assert sites and all(site.startswith("memory.layers.") for site in sites)
    said = SAID[memory] | {"gain_mean"}
    assert {name.rpartition(".")[2] for name in found} == said
