import pytest

from memlm.errors import UserError
from memlm.evaluation.suite.cells import make_cells, select
from memlm.evaluation.suite.config import load_suite


def grid(path, *overrides):
    return make_cells(load_suite(path, None, overrides))


def test_the_grid_in_the_order_of_the_file(suite_file):
    path = suite_file(
        tasks={"short": {}, "long x": {"train": {"steps": 99, "warmup_steps": 4}}},
        memories__gated_delta__widths=[16, 32],
        memories__gated_delta__learning_rates=[1e-2, 1e-3],
        memories__gated_delta__train={"warmup_steps": 5},
        seeds=[0, 7],
    )
    cells = grid(path)
    assert [cell.key for cell in cells[:6]] == [
        "short_attention_w8_lr0.003_s0",
        "short_attention_w8_lr0.003_s7",
        "short_gated_delta_w16_lr0.01_s0",
        "short_gated_delta_w16_lr0.01_s7",
        "short_gated_delta_w16_lr0.001_s0",
        "short_gated_delta_w16_lr0.001_s7",
    ]
    assert cells[10].key == "long-x_attention_w8_lr0.003_s0"
    assert len(cells) == 2 * (1 * 1 + 2 * 2) * 2
    # Base, task, memory and the place in the grid, each over the one before.
    first, last = cells[0].config, cells[-1].config
    assert [first.train.steps, first.train.warmup_steps] == [8, 2]
    assert [last.train.steps, last.train.warmup_steps] == [99, 5]
    assert cells[10].config.train.warmup_steps == 4
    assert [last.train.learning_rate, last.train.seed, last.data.seed] == [1e-3, 7, 7]
    assert last.model["hidden_size"] == 32
    assert last.evaluate.seed == 0


def test_without_axes_there_is_the_cell_of_the_run_config(suite_file):
    path = suite_file(widths=None, learning_rates=None, seeds=None, base__model={"hidden_size": 24})
    (first, _) = grid(path, "--base.train.learning_rate", "0.5")
    assert first.key == "parity_attention_w24_lr0.5_s0"
    # Tied embeddings of two numbers and four special tokens, two norms and four projections.
    assert first.parameters == (2 + 4) * 24 + 2 * 24 + 4 * 24 * 24


def test_with_muon_its_own_rate_is_swept(suite_file):
    train = {"optimizer": "muon", "muon_learning_rate": 0.02}
    path = suite_file(learning_rates=[0.5], memories__attention__train=train)
    muon, adamw = grid(path)
    assert (muon.learning_rate, muon.config.train.muon_learning_rate) == (0.5, 0.5)
    assert muon.config.train.learning_rate != 0.5
    assert adamw.config.train.learning_rate == 0.5
    (unswept, _) = grid(suite_file(learning_rates=None, memories__attention__train=train))
    assert unswept.learning_rate == 0.02


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"memories__gated_delta__train": {"warmup_step": 3}},
            ["memory gated_delta", "'train.warmup_step'", "'warmup_steps'"],
        ),
        (
            {"memories__gated_delta__model__layers": [{"mixer": {"type": "gated_delt"}}]},
            ["memory gated_delta", "gated_delt", "'gated_delta'"],
        ),
        ({"tasks__parity__train": {"length": 7}}, ["memory attention", "tokens_per_step", "7"]),
        ({"base__evaluate__tasks": ["parityy"]}, ["evaluate", "parityy", "'parity'"]),
        ({"base__evaluate": {}, "base__data__sources": [{"type": "x"}]}, ["sources", "'x'"]),
        ({"base__model": {"vocab_size": 1}}, ["vocab_size"]),
        ({"tasks": {"a b": {}, "a-b": {}}}, ["two cells would be named a-b_attention"]),
    ],
)
def test_mistakes_in_a_run_config_name_task_memory_and_key(suite_file, changes, parts):
    path = suite_file(**changes)
    with pytest.raises(UserError) as raised:
        grid(path)
    assert str(raised.value).startswith(f"{path} (task ")
    for part in parts:
        assert part in str(raised.value)


def test_no_evaluate_section(suite_file):
    path = suite_file(base={"data": {"tokenizer": "integers:2"}})
    with pytest.raises(UserError, match="needs an evaluate section"):
        grid(path)


def test_filters(suite_file):
    cells = grid(suite_file(seeds=[0, 1, 2], learning_rates=[3e-3, 1e-2]))
    found = select(cells, ["memory=attention", "seed=0", "seed=2", "learning_rate=3e-3"])
    assert [cell.key[-10:] for cell in found] == ["lr0.003_s0", "lr0.003_s2"]
    assert {cell.memory for cell in found} == {"attention"}
    assert select(cells, []) == cells
    with pytest.raises(UserError, match=r"--only memori=x: expected AXIS=VALUE; did you mean"):
        select(cells, ["memori=x"])
    with pytest.raises(UserError, match=r"no cell has it \(there are: 0, 1, 2\)"):
        select(cells, ["seed=3"])
