"""Results as an evaluation writes them, made up: no model is run."""

import functools
import math
from typing import Any

from memlm.evaluation.statistics import Estimate, bootstrap_mean, wilson

KEPT = {"on": 0.99, "off": 0.02, "reset": 0.0, "swapped": 0.01, "changed": 0.98, "absent": 0.0}
LENGTHS = ["1024", "4096", "16384", "65536"]


def plain(estimate: Estimate) -> dict[str, Any]:
    """As JSON holds it."""
    return {
        key: value if not isinstance(value, float) or math.isfinite(value) else None
        for key, value in vars(estimate).items()
    }


def share(value: float, count: int = 40) -> dict[str, Any]:
    """A share of trials with its interval."""
    value = min(max(value, 0.0), 1.0)
    return plain(wilson(round(value * count), count))


def cost(length: int, constant: bool) -> dict[str, Any]:
    """Of one setting; the state grows with the length unless it is constant."""
    keys = 4096 if constant else 512 * length
    memory = 65536 if constant else 0
    return {
        "tokens": {"read": 40 * length, "generate": 400},
        "seconds": {"read": 40 * length / 9000, "generate": 2.0},
        "read_tokens_per_second": 9000.0,
        "generate_tokens_per_second": 200.0,
        "state_bytes": keys + memory,
        "memory_state_bytes": memory,
        "key_value_bytes": keys,
        "peak_memory_bytes": (300 << 20) + (0 if constant else 2048 * length),
    }


def recall_task(
    title: str, lengths: list[str], constant: bool, conditions: list[str], **more: Any
) -> dict[str, Any]:
    """A task that hides something; the later lengths are harder."""

    def value(condition: str, place: float) -> float:
        fades = condition in ("on", "changed")
        return KEPT[condition] - (0.12 * place if fades else 0)

    scores = {
        length: {name: share(value(name, place)) for name in conditions}
        for place, length in enumerate(lengths)
    }
    ablated = [name for name in conditions if name != "on"]
    return {
        "title": title,
        "description": f"{title}: find it & repeat it.",
        "metric": "recall (%)",
        "axis": "length (tokens)",
        "kind": "hits",
        "scores": scores,
        "memory_gain": {
            length: {
                name: {**score["on"], "value": score["on"]["value"] - score[name]["value"]}
                for name in ablated
            }
            for length, score in scores.items()
        },
        "by_memory": {length: score["on"] for length, score in scores.items() if "off" in score},
        "depths": {},
        "cost": {length: cost(int(length), constant) for length in lengths},
        "failures": [],
        "seconds": 12.5,
    } | more


def with_depths(task: dict[str, Any]) -> dict[str, Any]:
    """The task with scores at five depths; the middle is harder."""
    task["depths"] = {
        length: {
            str(depth): {
                name: share(score["value"] - 0.3 * depth * (1 - depth), 8)
                for name, score in scores.items()
            }
            for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
        }
        for length, scores in task["scores"].items()
    }
    return task


def needle(lengths: list[str], constant: bool, conditions: list[str]) -> dict[str, Any]:
    """With depths, failures and all that a text can hold."""
    answer = {"prediction": "1\x07<i>2\n\ud800", "references": ["90210"], "score": 0.0}
    failures = [
        {
            "setting": lengths[-1],
            "trial": trial,
            "score": 0.0,
            "answers": [answer],
            "labels": {"depth": 0.25, "position": 17},
            "excerpt": f"if a < b & c:\n\tx{trial} = 1902109\n# The key is 90210.\n\x1b[0m</pre>",
        }
        for trial in range(3)
    ]
    return with_depths(
        recall_task(
            "Needle in real text",
            lengths,
            constant,
            conditions,
            failures=failures,
            least_distance_tokens=260,
            chance=1e-5,
        )
    )


def mqar(conditions: list[str]) -> dict[str, Any]:
    """Settings are numbers of pairs; nothing is generated."""
    task = recall_task("Multi-query associative recall", ["4", "8", "16"], True, conditions)
    spent = {"tokens": {"read": 100, "answer": 900}, "seconds": {"read": 1.0, "answer": 1.0}}
    rates = {"read_tokens_per_second": 100.0, "answer_tokens_per_second": 900.0}
    sizes = {
        "state_bytes": 9000, "memory_state_bytes": 8000, "key_value_bytes": 1000,
        "peak_memory_bytes": None,
    }  # fmt: skip
    costs = dict.fromkeys(task["scores"], spent | rates | sizes)
    return (
        task
        | {"axis": "key-value pairs", "kind": "shares", "cost": costs}
        | {
            "row_tokens": 512,
            "failures": [
                {
                    "setting": "16",
                    "trial": 0,
                    "score": 0.5,
                    "answers": [],
                    "labels": {},
                    "excerpt": "",
                }
            ],
        }
    )


def perplexity(conditions: list[str]) -> dict[str, Any]:
    """Losses by position; the last range has one document and no interval."""
    spans = {"all": 1.9, "1-127": 2.6, "128-255": 2.2, "256-511": 1.8}
    scores, gains = {}, {}
    for label, value in spans.items():
        documents = [0.0] if label == "256-511" else [-0.1, 0.0, 0.1, 0.2]
        scores[label] = {
            name: plain(bootstrap_mean([value + 0.3 * (name != "on") + d for d in documents]))
            for name in conditions
        }
        gains[label] = {
            name: plain(bootstrap_mean([0.3 + d / 10 for d in documents]))
            for name in conditions
            if name != "on"
        }
    return {
        "title": "Held-out text",
        "description": "The loss on documents that training never saw.",
        "metric": "bits per byte",
        "axis": "position (tokens)",
        "kind": "losses",
        "scores": scores,
        "memory_gain": gains,
        "by_memory": {},
        "depths": {},
        "cost": {
            "all": {
                "tokens": {"score": 2000}, "seconds": {"score": 2.0},
                "score_tokens_per_second": 1000.0, "state_bytes": 70000,
                "memory_state_bytes": 65536, "key_value_bytes": 4464, "peak_memory_bytes": None,
            }
        },
        "failures": [],
        "seconds": 3.0,
        "documents": 4,
        "tokens": 2048,
        "segment": 128,
        "perplexity_per_token": dict.fromkeys(conditions, 6.5),
    }  # fmt: skip


def run(name: str, tasks: dict[str, Any], reach: int | None = 260, **more: Any) -> dict[str, Any]:
    """One model."""
    model = {
        "name": name,
        "source": f"runs/{name}",
        "parameters": 435596,
        "attention_reach_tokens": reach,
        "fingerprint": "0123456789abcdef",
    }
    conditions = list(next(iter(next(iter(tasks.values()))["scores"].values())))
    return {"model": model, "conditions": conditions, "notes": [], "tasks": tasks} | more


def results(*runs: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What results.json holds."""
    return {
        "runs": list(runs),
        "comparisons": [],
        "command": "python eval.py --model 'a <b>'",
        "config": {"seed": 0},
        "confidence": 0.95,
        "seconds": 345.6,
        "versions": {"memlm": "0.1.0", "torch": "2.13.0"},
        "hashes": {"books/a & b.txt": "f" * 16},
    } | more


MEMORY = list(KEPT)
PLAIN = ["on", "changed", "absent"]


def two_models() -> dict[str, Any]:
    """A memory and a plain transformer that ends earlier; names that need escaping."""
    memory = run(
        "gated <delta> & co",
        {
            "needle": needle(LENGTHS, True, MEMORY),
            "mqar": mqar(MEMORY[:4]),
            "perplexity": perplexity(MEMORY[:4]),
        },
    )
    transformer = run(
        'llama "tiny"',
        {
            "needle": needle(LENGTHS[:3], False, PLAIN),
            "mqar": mqar(PLAIN[:1]),
            "perplexity": perplexity(PLAIN[:1]),
        },
        reach=None,
        notes=["The model has no memory: off, reset and swapped do not apply."],
    )
    difference = {"value": 0.05, "low": 0.01, "high": 0.09, "count": 40}
    comparisons = [
        {
            "task": "needle", "setting": setting, "first": "gated <delta> & co",
            "second": 'llama "tiny"', "difference": difference, "paired": setting == "1024",
            "first_only": 4, "second_only": 2,
        }
        for setting in ("1024", "4096")
    ]  # fmt: skip
    comparisons.append(
        comparisons[0]
        | {"task": "perplexity", "setting": "256-511", "first_only": 0, "second_only": 1}
        | {"difference": {"value": -0.25, "low": None, "high": None, "count": 1}}
    )
    return results(memory, transformer, comparisons=comparisons)


@functools.cache
def drawn() -> tuple[dict[str, Any], dict[str, bytes], dict[str, bytes]]:
    """Results, light and dark pictures; drawn once, for several files of tests."""
    from memlm.evaluation.plots import draw_plots

    found = two_models()
    return found, draw_plots(found), draw_plots(found, dark=True)
