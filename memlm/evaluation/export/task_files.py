"""The YAML of a task of lm-evaluation-harness, and which of our tasks it can score."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from memlm.errors import UserError
from memlm.evaluation.tasks import GROUPS, RULER

SCORES_MODULE = "answer_scores"  # the Python file beside the task files


@dataclass(frozen=True)
class Score:
    """How the harness scores an answer as we do.

    Attributes:
        pattern: what of an answer is compared with the reference; None = a function does it.
        function: of `answer_scores`.
        until: where an answer ends beside the end-of-text token.
    """

    pattern: str | None = None
    function: str = ""
    until: tuple[str, ...] = ()


_ALL, _ANY = Score(function="contains_all"), Score(function="contains_any")
SCORES = {
    "needle": Score(pattern=r"^\s*(\d+)"),
    "passkey": Score(pattern=r"0*(\d+)"),
    "niah": Score(function="contains_phrases"),
    **{name: _ANY if name.startswith("qa_") else _ALL for name in RULER},
    **dict.fromkeys((*GROUPS["babilong"], *GROUPS["stories"]), Score(function="names_labels")),
    "retention": Score(function="first_line_contains"),
    **dict.fromkeys(GROUPS["recall_completion"], Score(function="completes", until=("\n",))),
}


def find_score(task: str) -> Score:
    """The score of a task.

    Raises:
        UserError: for a task that cannot be exported.
    """
    if task in SCORES:
        return SCORES[task]
    if task.startswith("longbench"):
        reason = "lm-evaluation-harness has LongBench itself (its tasks longbench*)"
    elif task.startswith("scbench"):
        reason = "a conversation is no single question, and its turns have scores of their own"
    else:
        reason = "it scores token ids that no text asks for"
    raise UserError(
        f"tasks: {task} cannot be exported: {reason} (valid: needle, passkey, niah, ruler, "
        "babilong, stories, retention, recall_completion)"
    )


class _Function(str):
    """A name that the YAML marks as a function."""


class _Dumper(yaml.SafeDumper):
    """Writes functions with the harness's tag."""


_Dumper.add_representer(
    _Function, lambda dumper, value: dumper.represent_scalar("!function", str(value))
)


def task_yaml(
    name: str, title: str, score: Score, documents: Path, new_tokens: int, about: dict[str, Any]
) -> str:
    """The text of a task file.

    Args:
        name: of the harness's task.
        title: what it asks for.
        score: how.
        documents: the JSONL file, an absolute path.
        new_tokens: most tokens of an answer.
        about: further facts, for `metadata`.
    """
    task: dict[str, Any] = {
        "task": name,
        "task_alias": title,
        "tag": "memlm",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "test_split": "test",
        "output_type": "generate_until",
        "num_fewshot": 0,
        "doc_to_text": "text",
        "doc_to_target": "target",
        "generation_kwargs": {
            "until": list(score.until),
            "max_gen_toks": new_tokens,
            "do_sample": False,
        },
    }
    if score.pattern is None:
        task["process_results"] = _Function(f"{SCORES_MODULE}.{score.function}")
        metric = "score"
    else:
        regex = {"function": "regex", "regex_pattern": score.pattern}
        task["filter_list"] = [{"name": "answer", "filter": [regex, {"function": "take_first"}]}]
        metric = "exact_match"
    task["metric_list"] = [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]
    task["metadata"] = {"version": 1.0, **about}
    return yaml.dump(task, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
