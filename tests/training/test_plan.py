"""Plans of runs, beside what the processes of such runs really hold and send."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks.scaling import MODELS, decoder, model_table
from memlm.models import MemLMConfig
from memlm.training.plan import GPUS, Cluster, find_gpu, make_plan, report
from memlm.training.plan.__main__ import main
from memlm.training.plan.footprint import Rows, footprint
from tests.memory.processes import run_processes
from tests.training import plan_worker
from tests.training.launching import Job

DELTA = {"type": "gated_delta", "num_heads": 2, "head_dim": 16}
WINDOW = {"type": "sliding_attention", "window": 16, "num_heads": 4}
TABLE = {"type": "product_key", "num_keys": 48, "num_heads": 2, "top_k": 4, "share": "table"}
LAYERS = [
    {"repeat": 3, "mixer": DELTA, "ffn": "swiglu"},
    {"repeat": 2, "mixer": WINDOW, "ffn": TABLE},
]
MODEL = {"hidden_size": 64, "intermediate_size": 96, "layers": LAYERS}
NEAR = 0.05
RUN = {
    "model": MODEL,
    "steps": 2,
    "length": 32,
    "tokens_per_step": 512,
    "micro_batch_rows": 2,
    "carry_state": True,
    "value_optimizer": "lazy_adam",
    "log_every": 1000,
}


def planned(config, processes, parallel, **options):
    sizes = MemLMConfig.from_mapping({"vocab_size": 259} | config.model)
    cluster = Cluster(find_gpu("h100"), processes)
    train = dataclasses.replace(config.train, **options)
    length = train.stages()[-1].length
    return make_plan(sizes, train, cluster, parallel, document=length, device="cpu")


def assert_near(plan, processes):
    """That the largest of what the processes have is what the plan says."""
    memory = plan.memory
    by_rows = plan.options.memory_parallel > 1 and plan.options.memory_shard == "rows"
    expected = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "buckets": memory.buckets,
        "moments": memory.moments,
        "tables": memory.tables,
        "table_moments": memory.table_moments,
        "states": memory.states,
        "kept": memory.passes.kept,
        "reads": memory.own_reads,
    }
    for name, size in expected.items():
        found = max(result[name] for result in processes)
        if name == "reads" and by_rows:
            assert 0 < found <= size  # of a text of few words, whose reads repeat
        else:
            assert found == pytest.approx(size, rel=NEAR), name
    sent = processes[0]["sent"]
    assert_sent(plan, sent, by_rows)


def assert_sent(plan, sent, by_rows):
    payload = dict.fromkeys(("all-reduce", "all-gather", "reduce-scatter", "exchange"), 0)
    for item in plan.traffic:
        payload[item.operation] += item.payload
    # Norms, losses and counts are a few numbers.
    assert sent["allreduce"] == pytest.approx(payload["all-reduce"], rel=NEAR, abs=2000)
    gathered = sent.get("allgather_base", 0)
    assert gathered == pytest.approx(payload["all-gather"], rel=NEAR)
    assert sent.get("reduce_scatter_base", 0) == pytest.approx(payload["reduce-scatter"], rel=NEAR)
    exchanged = [item for item in plan.traffic if item.operation == "exchange"]
    if len({item.processes for item in exchanged}) == 1:
        share = (exchanged[0].processes - 1) / exchanged[0].processes
        found = share * (sent.get("allgather", 0) + sent.get("alltoall_base", 0))
        if by_rows:
            assert 0 < found <= payload["exchange"]
        else:
            assert found == pytest.approx(payload["exchange"], rel=NEAR)


def assert_rows_sent(plan, processes):
    """What processes send that hold rows together."""
    sent = [result["sent"] for result in processes]
    payload = {
        item.operation: item.payload for item in plan.traffic if item.name.startswith("rows: ")
    }
    assert sent[0]["allgather"] == pytest.approx(payload["all-gather"], rel=NEAR)
    assert sent[0]["reduce_scatter"] == pytest.approx(payload["reduce-scatter"], rel=NEAR)
    # A planned process has two neighbours; the last one sends its states to all.
    passed = sum(one.get("recv", 0) for one in sent) / (len(sent) - 1)
    assert passed + sent[0].get("broadcast", 0) == pytest.approx(payload["exchange"], rel=NEAR)


def compare(processes, make_config, *runs):
    """Plan and do runs: (parallel, options)."""
    kinds = [
        (parallel, make_config(f"run{number}", **(RUN | options)))
        for number, (parallel, options) in enumerate(runs)
    ]
    jobs = [Job(config, sharded=parallel == "fsdp2") for parallel, config in kinds]
    results = run_processes(processes, plan_worker.measure, jobs)
    for number, (parallel, config) in enumerate(kinds):
        assert_near(planned(config, processes, parallel), [one[number] for one in results])


def test_two_processes(make_config):
    compare(2, make_config, ("fsdp2", {"memory_parallel": 2, "tokens_per_step": 256}))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes(make_config, processes):
    compare(
        processes,
        make_config,
        ("ddp", {"optimizer": "muon", "memory_parallel": processes, "memory_shard": "rows"}),
        ("ddp", {"micro_batch_rows": None, "carry_state": False}),
        ("fsdp2", {"optimizer": "spam"}),
        ("fsdp2", {"memory_parallel": processes, "micro_batch_rows": 1}),
        ("fsdp2", {"value_optimizer": "rowwise_adagrad"}),
    )


@pytest.mark.slow
def test_rows_held_together(make_config):
    def config(name, *mixers, **options):
        layers = [{"repeat": 3, "mixer": mixer, "ffn": "swiglu"} for mixer in mixers]
        sizes = {"length": 128, "tokens_per_step": 256, "sequence_parallel": 2}
        return make_config(name, **(RUN | sizes | {"model": MODEL | {"layers": layers}} | options))

    again = {"activations": "recompute", "carry_state": False}
    configs = [
        config("keep", DELTA, WINDOW, {"type": "titans"}),
        config("again", WINDOW, {"type": "attention", "num_heads": 4}, **again),
    ]
    results = run_processes(2, plan_worker.measure, [Job(config) for config in configs])
    for number, config in enumerate(configs):
        assert_rows_sent(planned(config, 2, "ddp"), [one[number] for one in results])


def test_activations_by_policy_and_depth():
    def of(repeat, policy="keep"):
        layers = [LAYERS[0] | {"repeat": repeat}]
        config = MemLMConfig.from_mapping({"vocab_size": 259} | MODEL | {"layers": layers})
        return footprint(config, Rows(4, 32, 32), policy)

    two, many, again = of(2), of(13), of(2, "recompute")
    # Blocks beyond the second of a kind count as that one, and leave the worst moment alone.
    assert many.kept == pytest.approx(two.kept * 13 / 2, rel=0.15)
    assert many.working == pytest.approx(two.working, rel=0.01)
    assert again.kept < two.kept / 2
    assert again.working > two.working


def test_the_command(tmp_path, capsys):
    config = "configs/gated_delta.yaml"
    words = ["--config", config, "--preset", "tiny", "--gpus", "2", "--gpu", "l4"]
    assert main(words) == 0
    told = capsys.readouterr().out
    for part in ("it fits", "activations kept", "all-gather, 2 GPUs", "Assumed:", "tokens/s"):
        assert part in told
    for more, message in (
        (["--gpu", "h20O"], "unknown GPU 'h20O'; did you mean 'h200'?"),
        (["--gpus", "64"], "8 rows of 256 tokens cannot be shared by 64 processes"),
        (["--gpus", "0"], "--gpus: must be at least 1, got 0"),
        (["--length", "1000"], "is not a multiple of the row length 1000"),
        (["--train.memory_parallel", "2"], "the model has no value table"),
        (["--parallel", "tp"], "invalid choice: 'tp'"),
    ):
        assert main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_searches_are_those_of_a_gpu(monkeypatch):
    search = pytest.importorskip("memlm.cuda.topk_search.triton_search")
    store = {"type": "knn_cache", "capacity": 64, "segment": 16, "key_size": 16, "top_k": 4}
    layers = [{"mixer": WINDOW, "memory": store, "ffn": "swiglu"}]
    config = MemLMConfig.from_mapping({"vocab_size": 259} | MODEL | {"layers": layers})
    monkeypatch.setattr(search.eager, "topk_search", None)
    assert footprint(config, Rows(1, 32, 32)).kept > 0


def test_what_would_need_less_is_told(make_config):
    layers = [{"repeat": 2, "mixer": WINDOW, "ffn": "swiglu"}]
    plan = planned(make_config(**(RUN | {"model": MODEL | {"layers": layers}})), 8, "ddp")
    assert plan.fits
    large = dataclasses.replace(plan.memory, parameters=100 * 2**30)
    large = dataclasses.replace(plan, memory=large)
    assert any(line.startswith("it does NOT fit: 100.0 GiB") for line in report.lines(large))
    asked = []

    def again(**change):
        asked.append(change)
        return plan if change == {"parallel": "fsdp2"} else large

    told = list(report.alternatives(large, again))
    assert told[0] == "with --parallel fsdp2: 0.0 GiB, fits"
    assert "with train.activations: recompute: 100.0 GiB, does not fit" in told
    assert {"micro_batch_rows": 1, "activations": "recompute"} in asked


def test_every_gpu_has_a_peak_and_messages_take_time():
    for gpu in GPUS.values():
        assert gpu.peak("bf16") > gpu.peak("no") > 1e13
    inside, across = Cluster(GPUS["h100"], 8), Cluster(GPUS["h100"], 64)
    # 7/8 of a GB by NVLink at 80 % of 450 GB/s; 7/8 of it by 8 adapters of 50 GB/s.
    assert inside.collective_seconds(1e9, 8) == pytest.approx(7 / 8 / 360)
    assert across.collective_seconds(1e9, 64) == pytest.approx(7 / 8 / 320)
    assert across.exchange_seconds(63e9, 64) == pytest.approx((7 / 450 + 56 / 50) / 0.8)


def test_the_document_has_the_table_of_the_planner():
    page = Path(__file__).parents[2] / "docs" / "scaling.md"
    assert model_table() in page.read_text(encoding="utf-8")
    for name, *sizes in MODELS:
        numbers = sum(weight.numbers for weight in decoder(*sizes))
        assert numbers == pytest.approx(float(name[:-1]) * 10 ** (9 if name[-1] == "B" else 6), 0.1)
