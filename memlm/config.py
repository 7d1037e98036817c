"""The configuration of a run, and its strict loading from YAML and dotted overrides."""

import copy
import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from memlm.data.config import DataConfig, check_range
from memlm.errors import UserError, nearest, require_known
from memlm.files import replace_file
from memlm.yaml_tree import merge, parse_overrides, read_yaml, set_value

if typing.TYPE_CHECKING:
    from memlm.evaluation.config import EvaluationConfig

LOSS_GROUPS = ("text", "answer")
# Where train.evaluate_during differs from the evaluate section; its lengths are that of a row.
_DURING = {"tasks": ["needle"], "trials": 16, "conditions": ["on", "off"]}


@dataclass
class Stage:
    """One stage of the length curriculum.

    Attributes:
        length: tokens per row.
        window: cap on every sliding attention window in tokens; None = as the model has it.
        digits: lowest and highest number of digits of the training pass keys; None = as the data
            section has it.
        until: the stage ends at this fraction of all steps at the latest.
        until_answer_bits: it ends earlier once the loss of the answers, averaged over the last
            steps, is below this many bits per token.
    """

    length: int
    window: int | None = None
    digits: tuple[int, int] | None = None
    until: float = 1.0
    until_answer_bits: float | None = None

    def __post_init__(self) -> None:
        for name in ("length", "window", "until_answer_bits"):
            value, least = getattr(self, name), 0 if name == "until_answer_bits" else 1
            if value is not None and not value >= least:  # NaN as well
                raise UserError(f"train.curriculum: {name} must be at least {least}, got {value}")
        if self.digits is not None:
            check_range("train.curriculum: digits", self.digits)


@dataclass
class TrainConfig:
    """How a model is trained.

    Attributes:
        output_dir: run folder; None = runs/NAME for configs/NAME.yaml.
        seed: of the initial weights and of every random number drawn in a step.
        steps: optimizer steps.
        stop_answer_bits: the run ends earlier, in the last stage of its curriculum, once the loss
            of the answers, averaged over the last steps, is below this many bits per token.
        length: tokens per row when there is no curriculum.
        tokens_per_step: tokens of one optimizer step over all processes.
        micro_batch_rows: most rows of one forward pass on one process; a step that has more is
            accumulated. None = all at once.
        curriculum: stages of growing length; empty = one stage of `length`.
        carry_state: rows continue documents, and the memory states go from row to row.
        backprop: truncated = one graph for a whole row; replay = segments of `replay_segment` are
            run again one by one, for the same gradients in the memory of one segment.
        replay_segment: tokens of a segment of `backprop: replay`.
        loss_weights: {group: weight} with groups text and answer: the loss is the weighted sum of
            the groups' mean losses. None = the mean over all targets.
        optimizer: adamw; spam, AdamW that clips spikes and forgets its moments now and then; or
            muon for the hidden matrices with AdamW for everything else. Muon orthogonalises in
            bf16, so its runs repeat exactly, but another number of processes changes the losses by
            about 1e-4.
        spam_threshold: SPAM clips entries of the gradient whose square is above so many times its
            running mean.
        spam_reset_every: steps between two resets of SPAM's moments; no clipping in the 20 steps
            after one.
        spam_warmup_steps: steps of warm-up after each reset.
        learning_rate: of AdamW and SPAM.
        muon_learning_rate: of Muon.
        value_learning_rate: of the value tables of product-key memories, constant, no decay.
        value_optimizer: of the value tables. lazy_adam and rowwise_adagrad update only the rows
            that were read; adam is fused AdamW over whole tables; auto takes adam where a step
            reads most of a table's rows anyway, and else lazy_adam.
        memory_parallel: processes that hold each value table together, a part each; 1 = every
            process has whole tables.
        memory_shard: what a part has: columns of all values, or rows.
        warmup_steps: linear warm-up.
        schedule: after the warm-up, cosine over all steps, or wsd: constant, then a decay over the
            last steps, as 1 - sqrt.
        decay_fraction: of all steps, the share over which wsd decays.
        final_learning_rate: where the schedule ends, as a fraction of the learning rate.
        weight_decay: of everything but norms, biases, gates' rates and value tables.
        betas: of AdamW and SPAM.
        clip_norm: largest norm of the gradient; 0 = no clipping.
        max_skipped_steps: a step whose loss or gradient is not finite changes nothing and its batch
            is kept in the run folder's `skipped`; one more than so many in a row end the run.
        mixed_precision: no, or bf16.
        activations: what a block keeps for its backward pass. keep = everything; recompute = its
            input, and it runs twice; selective = what matrix products and attention gave, and only
            the rest is computed again; offload = everything, in the CPU's memory;
            recompute_offload = its input, in the CPU's memory.
        blockwise_tokens: attention and feed-forward run over so many tokens of a row at a time, and
            each piece is computed again in the backward pass (Blockwise Parallel Transformer);
            None = over whole rows.
        compile: compile the blocks with torch.compile; with activations keep and offload only.
        z_loss: weight of the square of the log of the softmax's denominator in the loss.
        sequence_parallel: processes that hold each row together, a run of its tokens each.
        reinit_keys_after: half keys of product-key memories that no token chose in so many steps
            are drawn anew; None = never. Many unread slots early in training are normal: usage
            can fall to a tenth before it recovers.
        log_every: steps between two log lines and metric records.
        evaluate_every: steps between two evaluations on held-out rows; 0 = before and after only.
        evaluation_rows: held-out rows of one evaluation; 0 = none.
        evaluate_during: tasks of those evaluations: fields of EvaluationConfig, by default 16
            needles in rows of the last stage's length, with the memory on and off. None = no tasks.
        save_every: steps between two checkpoints; 0 = at the end only.
        keep_checkpoints: how many of the latest checkpoints stay.
        keep_every: checkpoints at multiples of so many steps are written and stay for ever;
            0 = none.
        trackers: accelerate's trackers to log to, such as tensorboard or wandb.
    """

    output_dir: str | None = None
    seed: int = 0
    steps: int = 1000
    stop_answer_bits: float | None = None
    length: int = 1024
    tokens_per_step: int = 8192
    micro_batch_rows: int | None = None
    curriculum: list[Stage] = field(default_factory=list)
    carry_state: bool = False
    backprop: Literal["truncated", "replay"] = "truncated"
    replay_segment: int | None = None
    loss_weights: dict[str, float] | None = None
    optimizer: Literal["adamw", "spam", "muon"] = "adamw"
    spam_threshold: float = 5000.0
    spam_reset_every: int = 500
    spam_warmup_steps: int = 150
    learning_rate: float = 3e-4
    muon_learning_rate: float = 5e-3
    value_learning_rate: float = 1e-3
    value_optimizer: Literal["auto", "adam", "lazy_adam", "rowwise_adagrad"] = "auto"
    memory_parallel: int = 1
    memory_shard: Literal["columns", "rows"] = "columns"
    warmup_steps: int = 100
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_fraction: float = 0.1
    final_learning_rate: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    max_skipped_steps: int = 5
    mixed_precision: Literal["no", "bf16"] = "no"
    activations: Literal["keep", "recompute", "selective", "offload", "recompute_offload"] = "keep"
    blockwise_tokens: int | None = None
    compile: bool = False
    z_loss: float = 0.0
    sequence_parallel: int = 1
    reinit_keys_after: int | None = None
    log_every: int = 10
    evaluate_every: int = 0
    evaluation_rows: int = 32
    evaluate_during: dict[str, Any] | None = None
    save_every: int = 500
    keep_checkpoints: int = 2
    keep_every: int = 0
    trackers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:  # NaN as well
                raise UserError(f"train.{name}: must be at least {least}, got {value}")
            if value is not None and value >= _BOUND:
                raise UserError(f"train.{name}: must be below 2^63, got {value}")
        if self.output_dir is not None and (not self.output_dir or "\0" in self.output_dir):
            raise UserError("train.output_dir: needs the name of a folder, or null")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"train.betas: each must be in [0, 1), got {list(self.betas)}")
        if not 0 < self.decay_fraction <= 1:
            raise UserError(
                f"train.decay_fraction: must be above 0 and at most 1, got {self.decay_fraction}"
            )
        if self.spam_warmup_steps > self.spam_reset_every:
            raise UserError(
                f"train.spam_warmup_steps: {self.spam_warmup_steps} steps do not fit between two "
                f"resets, which train.spam_reset_every puts {self.spam_reset_every} apart"
            )
        ends = [stage.until for stage in self.stages()]
        if ends != sorted(ends) or not 0 < ends[0] <= ends[-1] == 1.0:
            raise UserError(
                f"train.curriculum: the `until` of the stages must grow to 1.0, got {ends}"
            )
        for stage in self.stages():
            if self.tokens_per_step % stage.length:
                raise UserError(
                    f"train.tokens_per_step: {self.tokens_per_step} is not a multiple of the row "
                    f"length {stage.length}"
                )
        for stage in self.stages():
            if stage.length % self.sequence_parallel:
                raise UserError(
                    f"train.sequence_parallel: rows of {stage.length} tokens cannot be shared "
                    f"equally by {self.sequence_parallel} processes"
                )
        if self.sequence_parallel > 1 and self.backprop == "replay":
            raise UserError(
                "train.sequence_parallel: replay needs whole rows; use train.backprop: truncated, "
                "with train.activations: recompute to save memory"
            )
        if self.sequence_parallel > 1 and self.compile:
            raise UserError(
                "train.compile: what processes send each other is not compiled; leave it out, or "
                "train.sequence_parallel at 1"
            )
        again = self.activations not in ("keep", "offload") or self.blockwise_tokens is not None
        if self.compile and again:
            raise UserError(
                "train.compile: what runs again is not compiled; use train.activations: keep or "
                "offload, without train.blockwise_tokens"
            )
        if self.activations == "selective" and self.blockwise_tokens is not None:
            raise UserError(
                "train.blockwise_tokens: what activations: selective keeps is what blocks of "
                "tokens compute again; use keep, recompute, offload or recompute_offload"
            )
        if (self.backprop == "replay") != (self.replay_segment is not None):
            raise UserError(
                f"train.replay_segment: {self.replay_segment} does not fit train.backprop: "
                f"{self.backprop}; replay needs a number of tokens, truncated has none"
            )
        for group in self.loss_weights or {}:
            if group not in LOSS_GROUPS:
                hint = nearest(group, LOSS_GROUPS) or f" (valid: {', '.join(LOSS_GROUPS)})"
                raise UserError(f"train.loss_weights: unknown group {group!r}{hint}")
        weights = [1.0] if self.loss_weights is None else list(self.loss_weights.values())
        if not all(0 <= weight < math.inf for weight in weights) or not sum(weights) > 0:
            raise UserError(
                "train.loss_weights: none may be negative or infinite, and one must be above 0, "
                f"got {self.loss_weights}"
            )

    def stages(self) -> list[Stage]:
        """The curriculum; one stage when none is configured."""
        return self.curriculum or [Stage(length=self.length)]

    def during(self) -> dict[str, Any] | None:
        """`evaluate_during` with its defaults."""
        if self.evaluate_during is None:
            return None
        return {**_DURING, "lengths": [self.stages()[-1].length], **self.evaluate_during}


_BOUND = 2**63  # of the numbers that torch takes
_LEAST = {
    "seed": 0,
    "steps": 1,
    "stop_answer_bits": 0,
    "length": 1,
    "tokens_per_step": 1,
    "micro_batch_rows": 1,
    "replay_segment": 1,
    "memory_parallel": 1,
    "blockwise_tokens": 1,
    "z_loss": 0,
    "sequence_parallel": 1,
    "warmup_steps": 0,
    "learning_rate": 0,
    "muon_learning_rate": 0,
    "value_learning_rate": 0,
    "final_learning_rate": 0,
    "weight_decay": 0,
    "spam_threshold": 1,
    "spam_reset_every": 1,
    "spam_warmup_steps": 0,
    "max_skipped_steps": 0,
    "clip_norm": 0,
    "reinit_keys_after": 1,
    "log_every": 1,
    "evaluate_every": 0,
    "evaluation_rows": 0,
    "save_every": 0,
    "keep_checkpoints": 1,
    "keep_every": 0,
}


@dataclass
class RunConfig:
    """Everything about one run: the sections of its YAML file.

    Attributes:
        model: fields of MemLMConfig; vocab_size and special tokens default to the tokenizer's. Or
            `{pretrained: folder or Hub id}`, a model that is already trained and goes on, with
            `insert: fields of InsertConfig` for new memories in its blocks; or with `attach: fields
            of AttachConfig`, which trains a memory beside the model as it is. data.tokenizer is
            then the model's own unless given.
        data: what the rows are made of.
        train: how the model is trained.
        evaluate: what to evaluate after training; None = nothing.
        name: name of the file without its ending, or "run".
    """

    model: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: "EvaluationConfig | None" = None
    name: str = "run"

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return Path(self.train.output_dir or f"runs/{self.name}")

    def to_dict(self) -> dict[str, Any]:
        """The sections as plain values, as a YAML file holds them."""
        sections = dataclasses.asdict(self)
        del sections["name"]
        return _plain(sections)


def load_config(
    path: str | Path, overrides: Iterable[str] = (), preset: str | None = None
) -> RunConfig:
    """Read a run config.

    Args:
        path: a YAML file with the sections model, data, train, evaluate and presets.
        overrides: command-line words: `--train.steps 200 --model.layers.0.memory=titans`. Values
            are YAML; numbers in a key are places in a list.
        preset: name of an entry of `presets`, nested values that are laid over the sections
            before the overrides. Lists of mappings of equal length merge element by element,
            other lists are replaced; so is a mapping that names another `type`.

    Raises:
        UserError: for a missing or broken file, an unknown key or a wrong value; the message
            names the file (or the override) and the dotted key.
    """
    path = Path(path)
    sections = read_yaml(path)
    presets = sections.pop("presets", None) or {}
    if not isinstance(presets, dict) or not all(isinstance(one, dict) for one in presets.values()):
        raise UserError(f"{path}: presets: expected a mapping of names to mappings of sections")
    if preset is not None:
        if preset not in presets:
            valid = ", ".join(presets) or "none"
            raise UserError(
                f"{path}: no preset {preset!r}{nearest(preset, presets)} (presets: {valid})"
            )
        sections = merge(sections, presets[preset])
    changed = parse_overrides(overrides)
    for key, value in changed.items():
        set_value(sections, key, value)
    return _build(sections, str(path), changed, path.stem)


def build_config(sections: dict[str, Any], where: str) -> RunConfig:
    """A run config from its sections, with the checks of `load_config`.

    Args:
        sections: model, data, train and evaluate, as a YAML file holds them.
        where: what they were taken from, for the messages.

    Raises:
        UserError: for an unknown key or a wrong value.
    """
    return _build(sections, where, {}, "run")


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the sections as YAML that `load_config` reads back to the same config."""
    replace_file(Path(path), yaml.safe_dump(config.to_dict(), sort_keys=False))


def _build(
    sections: dict[str, Any], source: str, changed: Mapping[str, Any], name: str
) -> RunConfig:
    def where(key: str) -> str:
        """Who set `key`."""
        if any(f"{key}.".startswith(f"{given}.") for given in changed):
            return "command line"
        if any(given.startswith(f"{key}.") for given in changed):
            return f"{source} and command line"
        return source

    _refuse_unknown(sections, ["model", "data", "train", "evaluate", "presets"], "", where)
    model = sections.get("model") or {}
    if not isinstance(model, dict):
        raise UserError(f"{source}: model: expected a mapping, got {model!r}")
    try:
        _check_model(model)
    except UserError as error:
        raise UserError(f"{where('model')}: {error}") from error
    if "pretrained" in model and isinstance(sections.get("data") or {}, dict):
        sections["data"] = {"tokenizer": model["pretrained"]} | (sections.get("data") or {})
    built: dict[str, Any] = {"model": model}
    train = sections.get("train")
    if isinstance(train, dict) and "gradient_checkpointing" in train:  # in older run folders
        raise UserError(
            f"{where('train.gradient_checkpointing')}: train.gradient_checkpointing is now "
            "train.activations: recompute for true, keep for false"
        )
    for section, section_class in (("data", DataConfig), ("train", TrainConfig)):
        if sections.get(section) is not None:
            built[section] = _typed(section_class, sections[section], section, where)
    if "train" in built and (during := built["train"].during()) is not None:
        during = _evaluation(during, "train.evaluate_during", where)
        built["train"].evaluate_during = dataclasses.asdict(during)
    if sections.get("evaluate") is not None:
        built["evaluate"] = _evaluation(sections["evaluate"], "evaluate", where)
    return RunConfig(**built, name=name)


def _evaluation(values: dict[str, Any], key: str, where) -> "EvaluationConfig":
    from memlm.evaluation.config import EvaluationConfig

    config = _typed(EvaluationConfig, values, key, where)
    try:
        config.validate()
    except UserError as error:
        raise UserError(f"{where(key)}: {key}.{error}") from error
    return config


_PRETRAINED = ("pretrained", "attach", "insert")  # keys of a model that is there already


def _check_model(model: dict[str, Any]) -> None:
    """Raise UserError for a model section that is of none of the kinds."""
    from memlm.models import AttachConfig, InsertConfig, MemLMConfig

    if not set(_PRETRAINED) & model.keys():
        MemLMConfig.from_mapping(model)
        return
    for key in model:
        if key in {field.name for field in dataclasses.fields(MemLMConfig)}:
            raise UserError(
                f"model.{key}: a pretrained model has its own; beside model.pretrained there is "
                "only model.insert or model.attach"
            )
    require_known(model, _PRETRAINED, "model")
    name = model.get("pretrained")
    if not isinstance(name, str) or not name:
        raise UserError(f"model.pretrained: expected a folder or a Hub id, got {name!r}")
    if {"attach", "insert"} <= model.keys():
        raise UserError(
            "model: attach leaves the model as it is, insert makes it one of this library; choose "
            "one of them"
        )
    for key, config in (("attach", AttachConfig), ("insert", InsertConfig)):
        if key not in model:
            continue
        if not isinstance(model[key], dict):
            raise UserError(f"model.{key}: expected a mapping with the memory, got {model[key]!r}")
        config.from_mapping(model[key], f"model.{key}")


def _refuse_unknown(values: Mapping, known: list[str], prefix: str, where) -> None:
    for key in values:
        if key not in known:
            dotted = f"{prefix}{key}"
            hint = nearest(key, known) or f" (valid: {', '.join(known)})"
            raise UserError(f"{where(dotted)}: unknown key {dotted!r}{hint}")


def _typed(hint: Any, value: Any, key: str, where) -> Any:
    """`value` as the annotated type `hint`, dataclasses and lists of them included."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{where(key)}: {key}: expected a mapping, got {value!r}")
        fields = {item.name: item for item in dataclasses.fields(hint)}
        _refuse_unknown(value, list(fields), f"{key}.", where)
        for name, item in fields.items():
            if item.default is MISSING and item.default_factory is MISSING and name not in value:
                raise UserError(f"{where(key)}: {key} needs {name!r}")
        hints = typing.get_type_hints(hint)
        values = {
            name: _typed(hints[name], item, f"{key}.{name}", where) for name, item in value.items()
        }
        try:
            return hint(**values)
        except UserError as error:
            raise UserError(f"{where(key)}: {error}") from error
    if typing.get_origin(hint) is list and dataclasses.is_dataclass(typing.get_args(hint)[0]):
        if not isinstance(value, list):
            raise UserError(f"{where(key)}: {key}: expected a list, got {value!r}")
        item_class = typing.get_args(hint)[0]
        return [_typed(item_class, item, f"{key}.{i}", where) for i, item in enumerate(value)]
    return _checked(hint, value, key, where)


def _checked(hint: Any, value: Any, key: str, where) -> Any:
    """`value` converted and checked by jsonargparse."""
    import jsonargparse

    optional = types.NoneType in typing.get_args(hint)
    free = hint in (dict[str, Any] | None, dict[str, dict[str, Any]])
    if hint == list[dict[str, Any]] or (free and isinstance(value, dict)):
        # Mappings of free content are checked by their owner; nothing may be converted inside.
        return value
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        if value is None and not optional:
            raise jsonargparse.ArgumentError(None, "no value")
        return parser.parse_object({"value": copy.deepcopy(value)})["value"]
    except jsonargparse.ArgumentError as error:
        raise UserError(f"{where(key)}: {key}: expected {_name(hint)}, got {value!r}") from error


def _name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is types.UnionType:
        return " or ".join(_name(item) for item in arguments)
    if origin is tuple:
        return f"a list of {len(arguments)} ({_name(arguments[0])})"
    if origin is list:
        return f"a list ({_name(arguments[0])})"
    if origin is dict:
        return f"a mapping to {_name(arguments[1])}"
    return "null" if hint is types.NoneType else hint.__name__


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
