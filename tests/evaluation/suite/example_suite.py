"""Results of suites as the engine leaves them, from few numbers."""

from memlm.evaluation.suite.points import make_points

FAILURE = "the loss is not finite at step 7"


def cell(memory, width, scores, task="parity", seed=0, error=None, state=None, **more):
    """A cell; scores: {setting: value with the memory on}."""
    state = dict.fromkeys(scores, 64 * width) if state is None else state
    return {
        "key": f"{task}-{memory}-{width}-{seed}",
        "task": task,
        "memory": memory,
        "width": width,
        "learning_rate": 0.003,
        "seed": seed,
        "parameters": 100 * width,
        "flops_per_token": 200 * width,
        "state_bytes": {} if error else state,
        "memory_state_bytes": {},
        "scores": {}
        if error
        else {task: {label: {"on": value} for label, value in scores.items()}},
        "measures": {},
        "held_out": {} if error else {"answer_bits": 0.5},
        "steps": 10,
        "seconds": 1.0,
        "evaluation_seconds": 0.5,
        "error": error,
    } | more


def suite(cells, **report):
    """results.json of these cells."""
    return {
        "suite": "tiny",
        "preset": "small",
        "title": "Tiny",
        "question": "Does it hold?",
        "command": "python -m memlm.evaluation.suite tiny --preset small",
        "report": report,
        "seconds": 3.0,
        "machine": {"processor": "AMD EPYC", "cores": 2, "gpu": None, "processes": 1},
        "versions": {"memlm": "1.0", "torch": "2.13"},
        "points": make_points(cells),
        "cells": cells,
        "missing": [],
    }
