"""The tasks by name. A new one is a file with a `Task` and a line here."""

from importlib import import_module

from memlm.data.stories import HOPS
from memlm.data.synthetic import GENERATORS
from memlm.errors import UserError, nearest
from memlm.evaluation.tasks.base import Task, Tools

_RULER_NIAH = ("ruler_niah", "RulerNiah")
_BABILONG = ("babilong", "Babilong")
_SCBENCH = (
    "scbench_kv", "scbench_prefix_suffix", "scbench_vt", "scbench_mf", "scbench_many_shot",
)  # fmt: skip
_SCBENCH_DATA = (  # with --scbench.data only
    "scbench_repoqa", "scbench_qa_eng", "scbench_qa_chn", "scbench_choice_eng", "scbench_summary",
    "scbench_summary_with_needles", "scbench_repoqa_and_kv",
)  # fmt: skip
_RECALL_COMPLETION = ("swde", "fda", "squad_completion", "triviaqa", "nq", "drop")
_LONGBENCH = tuple(
    f"longbench_{name}"
    for name in (
        "narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "gov_report",
        "qmsum", "multi_news", "trec", "triviaqa", "samsum", "passage_count",
        "passage_retrieval_en", "lcc", "repobench-p",
    )
)  # fmt: skip
_LONGBENCH_CHINESE = tuple(  # the last three have no score here, and say so
    f"longbench_{name}"
    for name in ("lsht", "passage_retrieval_zh", "multifieldqa_zh", "dureader", "vcsum")
)

TASKS = {
    "needle": ("needle", "NeedleTask"),
    "passkey": ("passkey", "Passkey"),
    "niah": ("niah", "Niah"),
    "niah_single_1": _RULER_NIAH,
    "niah_single_2": _RULER_NIAH,
    "niah_single_3": _RULER_NIAH,
    "niah_multikey_1": _RULER_NIAH,
    "niah_multikey_2": _RULER_NIAH,
    "niah_multikey_3": _RULER_NIAH,
    "niah_multivalue": _RULER_NIAH,
    "niah_multiquery": _RULER_NIAH,
    "vt": ("ruler_vt", "VariableTracking"),
    "cwe": ("ruler_cwe", "CommonWords"),
    "fwe": ("ruler_fwe", "FrequentWords"),
    "qa_1": ("ruler_qa", "QuestionAnswering"),
    "qa_2": ("ruler_qa", "QuestionAnswering"),
    **{f"babilong_qa{number}": _BABILONG for number in range(1, 21)},
    **{f"stories_{hops}": ("stories", "Stories") for hops in HOPS},
    "retention": ("retention", "Retention"),
    **dict.fromkeys((*_SCBENCH, *_SCBENCH_DATA), ("scbench", "Scbench")),
    **dict.fromkeys(_RECALL_COMPLETION, ("recall_completion", "RecallCompletion")),
    **dict.fromkeys((*_LONGBENCH, *_LONGBENCH_CHINESE), ("longbench", "Longbench")),
    "mqar": ("mqar", "Mqar"),
    "mqar_overwrite": ("mqar", "MqarOverwrite"),
    **dict.fromkeys(GENERATORS, ("synthetic", "Synthetic")),
    "perplexity": ("perplexity", "Perplexity"),
}
RULER = tuple(list(TASKS)[3:16])
GROUPS = {
    "ruler": RULER,
    "babilong": tuple(name for name in TASKS if name.startswith("babilong_")),
    "stories": tuple(f"stories_{hops}" for hops in HOPS),
    "scbench": _SCBENCH,
    "recall_completion": _RECALL_COMPLETION,
    "longbench": _LONGBENCH,
    "chomsky": tuple(name for name in GENERATORS if name.startswith("chomsky_")),
}


def expand_tasks(names: list[str]) -> list[str]:
    """Task names in the given order, groups replaced by their tasks, none twice.

    Raises:
        UserError: for no or an unknown name.
    """
    known = [*TASKS, *GROUPS]
    if not names:
        raise UserError(f"tasks: empty; choose from {', '.join(known)}")
    found: dict[str, None] = {}
    for name in names:
        if name not in known:
            raise UserError(
                f"tasks: unknown task {name!r}{nearest(name, known)} (valid: {', '.join(known)})"
            )
        found |= dict.fromkeys(GROUPS.get(name, (name,)))
    return list(found)


def task_class(name: str) -> type[Task]:
    """The class of the task `name`."""
    module, task = TASKS[name]
    return getattr(import_module(f"memlm.evaluation.tasks.{module}"), task)


def make_task(name: str, tools: Tools) -> Task:
    """The task `name`.

    Raises:
        UserError: for sizes that cannot work, a tokenizer that does not fit, a missing corpus.
    """
    return task_class(name)(name, tools)
