"""The model card: README.md of a model on the Hub, from its config and its run folder."""

import copy
import shlex
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModelForCausalLM, PreTrainedConfig

from memlm.errors import UserError
from memlm.files import replace_file
from memlm.models.attached_files import CONFIG_FILE, read_attached_config
from memlm.models.configuration import MemLMConfig
from memlm.models.run_facts import CURVES_FILE, RunFacts, TaskScores, read_run

CARD_FILE = "README.md"
MARK = "<!-- memlm wrote this card, and writes it anew; without this line it stays as it is. -->"
_LOSSES = {
    "bits_per_byte": "bits per byte",
    "bits_per_byte_off": "bits per byte, memories off",
    "answer_bits": "bits per token of answers",
    "answer_bits_off": "bits per token of answers, memories off",
}


def write_card(
    folder: Path,
    config: Any,
    run: Path | None = None,
    repo_id: str | None = None,
    license: str | None = None,
    tags: Sequence[str] | None = None,
) -> bool:
    """Write README.md, and the pictures in it, beside a model.

    Args:
        folder: of the model.
        config: a MemLMConfig, or what memory_config.json of an attached memory holds.
        run: the run folder, or the checkpoint in it, that holds this very model; None = nothing is
            known of its training.
        repo_id: owner/name on the Hub; None = the card tells how to load a folder.
        license: of the weights, as the Hub spells it; None = the card has none.
        tags: further ones.

    Returns:
        Whether it was written: False where a user wrote a card, here or in the run folder; that
        one stays, or is copied from there.

    Raises:
        UserError: for a file of the run that is damaged.
    """
    path = folder / CARD_FILE
    facts = None if run is None else read_run(run)
    for written in (path, path if facts is None else facts.folder / CARD_FILE):
        if written.is_file() and not is_own_card(written.read_text(encoding="utf-8")):
            if written != path:
                shutil.copyfile(written, path)
            return False
    attached = isinstance(config, dict)
    names = _attached_names(config) if attached else memory_names_of(config)
    title = (repo_id or str((run or folder).resolve())).rstrip("/").rsplit("/", 1)[-1]
    pictures = _pictures(facts)
    parts = [
        _front(config, facts, title, [*names, *(tags or ())], license),
        MARK,
        f"# {title}",
        _attached_text(config) if attached else _model_text(config, names),
        "## Use",
        _use(repo_id or str(folder), config if attached else None),
        *(_training(facts, pictures) if facts else []),
        *(_recall(facts.tasks, pictures) if facts else []),
        *(_origin(facts) if facts else []),
    ]
    for name, picture in pictures.items():
        if picture.resolve() != (folder / name).resolve():
            shutil.copyfile(picture, folder / name)
    replace_file(path, "\n\n".join(parts) + "\n")
    return True


def write_run_card(run: Path) -> bool:
    """Write the card of a finished run into its folder; see `write_card`."""
    config = card_config(run)
    return config is not None and write_card(run, config, run)


def is_own_card(text: str) -> bool:
    """Whether a card is one that `write_card` may write anew."""
    return MARK in text


def card_config(folder: Path) -> MemLMConfig | dict[str, Any] | None:
    """What a card says of the model in a folder: the config, or an attached memory's.

    None for a model of another library, which a card would not describe.

    Raises:
        UserError: for a file that is missing or damaged.
    """
    if (folder / CONFIG_FILE).is_file():
        return read_attached_config(folder)
    try:
        values, _ = PreTrainedConfig.get_config_dict(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: config.json is missing or damaged") from error
    if values.get("model_type") != MemLMConfig.model_type:
        return None
    return MemLMConfig.from_pretrained(folder)


def memory_names_of(config: Any) -> list[str]:
    """The names of the memories in a MemLMConfig, each once, from bottom to top."""
    plans = [entry for plan in config.plan() for entry in (plan.mixer, plan.memory, plan.ffn)]
    entries = [*plans, config.output_plan()]
    plain = ("attention", "sliding_attention", "swiglu", "moe")
    return list(dict.fromkeys(name for name, _ in filter(None, entries) if name not in plain))


def _attached_names(config: dict[str, Any]) -> list[str]:
    specs = (config["attach"].get("memory"), config["attach"].get("output"))
    return [spec if isinstance(spec, str) else spec["type"] for spec in specs if spec]


def _front(
    config: Any, facts: RunFacts | None, title: str, tags: Sequence[str], license: str | None
) -> str:
    sources = (facts.sections.get("data") or {}).get("sources") or () if facts else ()
    datasets = [source["dataset"] for source in sources if source.get("type") == "hub"]
    datasets = [name for name in dict.fromkeys(datasets) if _is_id(name)]
    start = (facts.start or {}) if facts else {}
    base = config["base_model"] if isinstance(config, dict) else start.get("base")
    base = base and base["name"]
    results = list(_results(facts.tasks)) if facts else []
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["memlm", *tags],
        license=license,
        datasets=datasets or None,
        base_model=base if base and _is_id(base) else None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _is_id(name: str) -> bool:
    """Whether a name is one on the Hub, and not that of a folder, here or elsewhere."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _results(tasks: Iterable[TaskScores]) -> Iterable[EvalResult]:
    """The scores with the memories as trained, in the Hub's schema."""
    for task in tasks:
        for setting, conditions in task.scores.items():
            value = conditions["on"]["value"] if "on" in conditions else None
            if value is None:  # not judged, or not a finite number
                continue
            yield EvalResult(
                task_type="text-generation",
                dataset_type=f"memlm-{task.name}",
                dataset_name=f"{task.title}, {setting}",
                dataset_config=setting,
                metric_type=task.metric.removesuffix(" (%)").replace(" ", "_"),
                metric_name=task.metric,
                metric_value=round(value if task.kind == "losses" else 100 * value, 4),
            )


def _model_text(config: Any, names: Sequence[str]) -> str:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        states = model.init_states(1)
    memory = f"memories ({', '.join(names)})" if names else "no memory"
    lines = [
        f"A causal language model with {memory}: {model.num_parameters():,} parameters, hidden "
        f"size {config.hidden_size}, a vocabulary of {config.vocab_size:,}.",
        "",
        "| layers | mixer | memory | feed-forward | state of the memories |",
        "|---|---|---|---|---|",
    ]
    sizes = {name: states[name].nbytes for name in model.memory_state_names()}
    first = 0
    for pattern in config.layers:
        repeat = pattern.get("repeat", 1)
        where = f"{first}" if repeat == 1 else f"{first} to {first + repeat - 1}"
        sites = [_specification(pattern.get(site)) for site in ("mixer", "memory", "ffn")]
        own = sum(sizes.get(name, 0) for name in model.model.layers[first].state_names())
        lines.append(f"| {where} | {' | '.join(sites)} | {own:,} bytes in each layer |")
        first += repeat
    if config.output is not None:
        lines.append(f"| output | – | {_specification(config.output)} | – | |")
    lines += [
        "",
        f"The memories keep {sum(sizes.values()):,} bytes of a sequence in float32, however long "
        "it is.",
    ]
    return "\n".join(lines)


def _specification(spec: Any) -> str:
    """A site of a layer: `name` (key value, ...)."""
    if spec is None:
        return "–"
    if isinstance(spec, str):
        return f"`{spec}`"
    options = ", ".join(f"{key} {value}" for key, value in spec.items() if key != "type")
    return f"`{spec['type']}`" + (f" ({options})" if options else "")


def _attached_text(config: dict[str, Any]) -> str:
    attach, base = config["attach"], config["base_model"]
    parts = {"memory": attach.get("memory"), "output memory": attach.get("output")}
    found = " and ".join(f"{kind} {_specification(spec)}" for kind, spec in parts.items() if spec)
    layers = attach.get("layers")
    where = "" if not layers else f" in layers {', '.join(map(str, layers))}"
    revision = f", revision `{base['revision']}`" if base["revision"] else ""
    return (
        f"A memory for a pretrained model: {found}{where}, trained on "
        f"`{base['name'] or base['model_type']}`{revision}. These files hold the memory only; the "
        "model is loaded by its own name."
    )


def _use(source: str, attached: dict[str, Any] | None) -> str:
    lines = ["```python", "import memlm"]
    if attached is None:
        lines += [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{source}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{source}")',
        ]
    else:
        lines += [
            "from transformers import AutoTokenizer",
            "",
            f'model = memlm.load_attached("{source}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{attached["base_model"]["name"]}")',
        ]
    lines += [
        'inputs = tokenizer("Once", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))",
        "```",
    ]
    if attached is None:
        lines += [
            "",
            "Where memlm is installed but not imported, `trust_remote_code=True` does the same.",
        ]
    return "\n".join(lines)


def _training(facts: RunFacts, pictures: dict[str, Path]) -> list[str]:
    train, data = (facts.sections.get(name) or {} for name in ("train", "data"))
    parts = ["## Training"]
    if {"steps", "tokens_per_step"} <= train.keys():
        before = "" if facts.step is None else f"Step {facts.step:,} of a run of "
        parts.append(
            f"{before}{train['steps']:,} steps of {train['tokens_per_step']:,} tokens, tokenizer "
            f"`{data.get('tokenizer')}`{_base(facts)}, on:"
        )
        parts.append("\n".join(f"- {_specification(s)}" for s in data.get("sources") or ()))
    if facts.losses:
        rows = [(label, facts.losses.get(name)) for name, label in _LOSSES.items()]
        rows = [(label, value) for label, value in rows if value is not None]
        lines = [f"| {label} | {value:.4f} |" for label, value in rows]
        head = f"| held-out rows, after step {facts.losses['step']:,} | |"
        parts.append("\n".join([head, "|---|---|", *lines]))
    if CURVES_FILE in pictures:
        parts.append(f"![Losses and more by step]({CURVES_FILE})")
    if facts.config:
        summary = "<summary>config.yaml</summary>"
        parts.append(f"<details>{summary}\n\n```yaml\n{facts.config.rstrip()}\n```\n\n</details>")
    return parts


def _base(facts: RunFacts) -> str:
    """The pretrained model that a run went on from, to go on a sentence with."""
    base = (facts.start or {}).get("base")
    if not base or "attach" in (facts.sections.get("model") or {}):
        return ""
    revision = f" (revision `{base['revision']}`)" if base["revision"] else ""
    name = base["name"] if _is_id(base["name"]) else Path(base["name"]).name
    return f", from the weights of `{name}`{revision}"


def _recall(tasks: Sequence[TaskScores], pictures: dict[str, Path]) -> list[str]:
    parts = ["## Recall"] if tasks else []
    for task in tasks:
        conditions = list(dict.fromkeys(name for scores in task.scores.values() for name in scores))
        lines = [
            f"| {task.metric} | {' | '.join(f'memories {name}' for name in conditions)} |",
            "|---" * (len(conditions) + 1) + "|",
        ]
        for setting, scores in task.scores.items():
            cells = [_estimate(scores.get(name), task.kind) for name in conditions]
            lines.append(f"| {setting} | {' | '.join(cells)} |")
        parts += [f"### {task.title}", task.description, "\n".join(lines)]
        if task.picture is not None and task.picture.name in pictures:
            parts.append(f"![{task.title}]({task.picture.name})")
    if tasks:
        parts.append(f"In brackets: intervals of {tasks[0].confidence:.0%} confidence.")
    return parts


def _estimate(estimate: dict[str, Any] | None, kind: str) -> str:
    if estimate is None:
        return "–"
    scale, digits = (1, 3) if kind == "losses" else (100, 1)
    value, low, high = (
        "?" if estimate[key] is None else f"{scale * estimate[key]:.{digits}f}"
        for key in ("value", "low", "high")
    )
    return f"{value} [{low}, {high}]"


def _origin(facts: RunFacts) -> list[str]:
    """Command and versions; neither hosts nor folders of the machine."""
    start = facts.start
    if start is None:
        return []
    command = shlex.join(_without_folder(word) for word in shlex.split(start["command"]))
    versions = ", ".join(f"{name} {number}" for name, number in start["versions"].items())
    code = start.get("code")
    revision = ""
    if code:
        revision = f"; revision `{code['revision']}`" + (", changed" if code["dirty"] else "")
    devices = ", ".join(dict.fromkeys(process["name"] for process in start["processes"]))
    return [
        "## Command and versions",
        f"```bash\n{command}\n```",
        f"{versions}{revision}. Processes: {len(start['processes'])} ({devices}).",
    ]


def _without_folder(word: str) -> str:
    """A word of a command line, of an absolute path its last part alone."""
    option, equals, value = word.rpartition("=")
    return f"{option}{equals}{Path(value).name if Path(value).is_absolute() else value}"


def _pictures(facts: RunFacts | None) -> dict[str, Path]:
    """The pictures of a card by their names beside it."""
    if facts is None:
        return {}
    paths = [facts.folder / CURVES_FILE, *(task.picture for task in facts.tasks)]
    return {path.name: path for path in paths if path is not None and path.is_file()}
