import copy

import pytest
import yaml

from memlm.evaluation.suite.workers import Outcome

SUITE = {
    "title": "Tiny",
    "question": "Does it run?",
    "report": {"kind": "lengths", "task": "parity"},
    "base": {
        "model": {"intermediate_size": 16},
        "data": {"tokenizer": "integers:2", "sources": [{"type": "parity", "lengths": [4, 12]}]},
        "train": {
            "steps": 8,
            "length": 16,
            "tokens_per_step": 64,
            "warmup_steps": 2,
            "evaluation_rows": 4,
            "save_every": 0,
        },
        "evaluate": {
            "tasks": ["parity"],
            "conditions": ["on"],
            "synthetic": {"lengths": [6, 12], "rows": 8},
        },
    },
    "tasks": {"parity": {}},
    "memories": {
        "attention": {
            "model": {"layers": [{"mixer": {"type": "attention", "num_heads": 1}, "ffn": None}]}
        },
        "gated_delta": {
            "model": {"layers": [{"mixer": {"type": "gated_delta", "num_heads": 1}, "ffn": None}]}
        },
    },
    "widths": [8],
    "learning_rates": [3e-3],
    "seeds": [0],
}


@pytest.fixture
def suite_file(tmp_path):
    """`suite_file(**changes)`: the path of a tiny suite; dots in keys are written as __."""

    def write(text=None, **changes):
        suite = copy.deepcopy(SUITE)
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = suite
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = value
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(suite, sort_keys=False) if text is None else text)
        return str(path)

    return write


class Here:
    """Does the jobs in this process; stops as Ctrl-C does before the one numbered `stop`."""

    count, running = 1, ()

    def __init__(self, stop=None):
        self.stop, self.jobs = stop, []

    def run(self, function, jobs):
        for number, (name, arguments) in enumerate(jobs):
            if number == self.stop:
                raise KeyboardInterrupt
            self.jobs.append(name)
            yield None
            yield Outcome(name, function(*arguments))


@pytest.fixture
def here():
    """The class of workers that are none."""
    return Here
