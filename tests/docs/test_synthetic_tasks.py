"""docs/data.md: its task and its config work as they stand there."""

import re
import sys
import types
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml

from memlm.config import load_config
from memlm.data.synthetic import SyntheticRows, generator_class
from memlm.errors import UserError

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## Synthetic tasks")[1].split("\n## ")[0]


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)
    return found


def test_the_task_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("task_of_the_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look it up by name
    exec(compile(block("python"), "docs/data.md", "exec"), module.__dict__)
    task = module.FirstToken()
    batch = SyntheticRows(task, 20, seed=0, lengths=(2, 9)).batch(np.arange(20))
    ends = batch["input_ids"] == task.tokens
    assert (ends == (batch["labels"] != -100)).all()
    for row, column in np.argwhere(ends):
        start = column - batch["position_ids"][row, column]
        assert batch["labels"][row, column] == batch["input_ids"][row, start] < task.tokens
    with pytest.raises(UserError, match="needs tokens >= 2"):
        SyntheticRows(task, 1, seed=0)


def test_the_config_of_the_page(tmp_path: Path) -> None:
    path = tmp_path / "induction.yaml"
    path.write_text(block("yaml"))
    config = load_config(path, [])
    (source,) = config.data.parsed_sources()
    assert source.lengths == (8, 64)
    assert source.generator.tokens == 16
    assert config.train.length == 64


def test_options_and_defaults_of_the_page() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\|(.*)\|$", SECTION, re.MULTILINE)
    assert len(rows) >= 7
    for name, options in rows:
        told = [yaml.safe_load(option) for option in re.findall(r"`(\w+: [^`]+)`", options)]
        defaults = asdict(generator_class(name)())
        assert all(option.items() <= defaults.items() for option in told)
        if "as `" not in options:
            assert {key for option in told for key in option} == defaults.keys()
