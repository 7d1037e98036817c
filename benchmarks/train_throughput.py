"""Tokens per second of training, next to transformers' Llama and its Trainer.

python -m benchmarks.train_throughput --device cpu

Both train a model of the same sizes from the same weights on the same rows, in float32: AdamW
fused, sdpa, clipping, warm-up and cosine, a log record of loss and gradient norm every ten steps.
Ours cuts its rows out of the tokens while it trains; the Trainer is handed them ready as tensors.
Neither evaluates, saves or has a tracker within what is timed, which is everything between the
begin of a step and the begin of the next: data, both passes, clipping, update, logs. Each side is
a process of its own and they take turns step by step, so that whatever else the machine does meets
both. A round has the ratio of the sums of its steps; what counts is the median over the rounds.

The loss of the first step is checked to be the same, so that like is compared with like.
"""

import argparse
import contextlib
import dataclasses
import io
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from transformers import Trainer as PeerTrainer
from transformers.trainer_utils import SaveStrategy

from benchmarks import report
from benchmarks.library import positive
from memlm.config import RunConfig, TrainConfig
from memlm.data import DataConfig
from memlm.models import MemLMForCausalLM
from memlm.training import Trainer, trainer
from memlm.training.feed import RowFeed
from memlm.training.logs import METRICS_FILE, read_metrics
from memlm.training.replay import WholeRows
from memlm.training.report import Report

NEEDED = 1.0  # of the throughput of the peer
LARGEST_SHARE = 0.02  # of a step, for rows and logs
DROPPED = 5  # steps at the start of every run
LOG_EVERY = 10
LOSS_TOLERANCE = 1e-4
SIDES = ("ours", "theirs")
PIECES = ("rows", "forward", "backward", "clip", "update", "log")


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of both models and of a step.

    Attributes:
        rows: rows of `length` tokens in a step.
    """

    name: str
    hidden_size: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate_size: int
    vocabulary: int
    tied: bool
    length: int
    rows: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.length


SIZES = (
    Size("small", 128, 4, 4, 4, 384, 512, True, 256, 4),
    Size("grouped", 256, 4, 8, 4, 704, 2048, True, 256, 4),
    Size("larger", 384, 6, 6, 6, 1024, 4096, False, 512, 1),
)


@dataclasses.dataclass
class Run:
    """What one run took.

    Attributes:
        seconds, cpu_seconds: per step, after the first ones.
        losses: of the logged steps.
        pieces: seconds per step of each of PIECES; empty for the peer.
        parameters: of the model.
    """

    seconds: float
    cpu_seconds: float
    losses: list[float]
    pieces: dict[str, float]
    parameters: int


class Clock:
    """Times the steps of one side, and the pieces of those that count.

    Args:
        steps: of the run. The first ones and the last do not count: that one saves the model.
        wait: called where a step begins; returns when it is this side's turn.
    """

    def __init__(self, steps: int, wait: Callable[[], None]):
        self.steps, self.wait = steps, wait
        self.took: list[tuple[float, float]] = []
        self.pieces = dict.fromkeys(PIECES, 0.0)
        self._began: tuple[float, float] | None = None

    @property
    def counts(self) -> bool:
        """Whether the present step counts."""
        return DROPPED <= len(self.took) < self.steps - 1

    def begin(self) -> None:
        """A step begins, and with it the one before is over."""
        now = time.perf_counter(), time.process_time()
        if self._began is not None:
            self.took.append((now[0] - self._began[0], now[1] - self._began[1]))
        self.wait()
        self._began = time.perf_counter(), time.process_time()

    def timed(self, piece: str, function: Callable, begins: bool = False) -> Callable:
        """`function`, whose time counts for `piece`; with `begins` a step begins with it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if begins:
                self.begin()
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if self.counts:
                    self.pieces[piece] += time.perf_counter() - start

        return call

    def result(self, losses: list[float], parameters: int, pieces: bool) -> Run:
        """What the run took, once it is over."""
        took = self.took[DROPPED:]
        wall, cpu = (sum(part) / len(took) for part in zip(*took, strict=True))
        parts = {name: total / len(took) for name, total in self.pieces.items()}
        return Run(wall, cpu, losses, parts if pieces else {}, parameters)


def our_config(size: Size, steps: int, text: Path, folder: Path) -> RunConfig:
    """The run of our side."""
    mixer = {
        "type": "attention",
        "num_heads": size.heads,
        "num_key_value_heads": size.key_value_heads,
    }
    return RunConfig(
        model={
            "vocab_size": size.vocabulary,
            "hidden_size": size.hidden_size,
            "intermediate_size": size.intermediate_size,
            "layers": [{"repeat": size.layers, "mixer": mixer, "ffn": "swiglu"}],
            "tie_word_embeddings": size.tied,
        },
        data=DataConfig(sources=[{"type": "text", "files": [str(text)]}], validation_fraction=0.0),
        train=TrainConfig(
            output_dir=str(folder),
            steps=steps,
            length=size.length,
            tokens_per_step=size.tokens,
            warmup_steps=steps // 10,
            log_every=LOG_EVERY,
            evaluation_rows=0,
            save_every=0,
        ),
    )


def llama(size: Size) -> LlamaForCausalLM:
    """The peer's model."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=size.length,
        tie_word_embeddings=size.tied,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def copy_weights(ours: MemLMForCausalLM, theirs: LlamaForCausalLM) -> None:
    """Give the Llama our weights.

    Raises:
        ValueError: for weights of other shapes, or one that has none of ours.
    """
    renamed = {"self_attn": "mixer.module", "mlp": "ffn.module"}
    renamed |= {"input_layernorm": "mixer.norm", "post_attention_layernorm": "ffn.norm"}
    own = dict(ours.named_parameters())
    for name, weight in theirs.named_parameters():
        for old, new in renamed.items():
            name = name.replace(old, new)
        source = own.pop(name)
        if source.shape != weight.shape:
            raise ValueError(f"{name}: {tuple(source.shape)} here, {tuple(weight.shape)} there")
        weight.data.copy_(source.data)
    if own:
        raise ValueError(f"the Llama has no {', '.join(own)}")


def train_ours(config: RunConfig, wait: Callable[[], None]) -> Run:
    """Train our side; its log lines are not shown. `wait` as in `Clock`."""
    clock = Clock(config.train.steps, wait)
    run = Trainer(config)
    with contextlib.redirect_stdout(io.StringIO()), _watched(clock):
        run.run()
    records = read_metrics(config.output_dir / METRICS_FILE)
    losses = [record["loss"] for record in records]
    return clock.result(losses, _parameters(run.model), pieces=True)


@contextlib.contextmanager
def _watched(clock: Clock) -> Iterator[None]:
    """Our steps call the clock in here."""
    places = {
        "rows": (RowFeed, "get"),
        "forward": (WholeRows, "forward"),
        "backward": (WholeRows, "backward"),
        "clip": (trainer, "clip_gradients"),
        "update": (torch.optim.AdamW, "step"),
        "log": (Report, "after_step"),
    }
    with contextlib.ExitStack() as stack:
        for piece, (owner, name) in places.items():
            timed = clock.timed(piece, getattr(owner, name), begins=piece == "rows")
            stack.enter_context(mock.patch.object(owner, name, timed))
        yield


class _Begins(TrainerCallback):
    def __init__(self, clock: Clock):
        self.clock = clock

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.begin()


def train_theirs(size: Size, config: RunConfig, wait: Callable[[], None]) -> Run:
    """Train the peer from our weights on our rows, in their order."""
    ours, rows = prepared_rows(config)
    model = llama(size)
    copy_weights(ours, model)
    options = config.train
    arguments = TrainingArguments(
        output_dir=config.output_dir,
        use_cpu=True,
        max_steps=options.steps,
        per_device_train_batch_size=options.tokens_per_step // options.length,
        train_sampling_strategy="sequential",
        optim="adamw_torch_fused",
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        adam_beta1=options.betas[0],
        adam_beta2=options.betas[1],
        max_grad_norm=options.clip_norm,
        lr_scheduler_type="cosine",
        warmup_steps=options.warmup_steps,
        logging_steps=options.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        save_strategy=SaveStrategy.NO,
        report_to="none",
        disable_tqdm=True,
        seed=options.seed,
    )
    clock = Clock(options.steps, wait)
    dataset = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    peer = PeerTrainer(model, arguments, train_dataset=dataset, callbacks=[_Begins(clock)])
    with contextlib.redirect_stdout(io.StringIO()):
        peer.train()
    losses = [float(entry["loss"]) for entry in peer.state.log_history if "loss" in entry]
    return clock.result(losses, _parameters(model), pieces=False)


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def prepared_rows(config: RunConfig) -> tuple[MemLMForCausalLM, dict[str, Tensor]]:
    """Our model before its first step, and the rows of all steps as a Llama takes them."""
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, output_dir=f"{config.output_dir}-rows")
    )
    run = Trainer(config)
    batches = [run.feed.get(step) for step in range(config.train.steps)]
    run.feed.close()
    rows = {name: torch.cat([b[name] for b in batches]) for name in ("input_ids", "labels")}
    # The targets are shifted already; `labels` are only counted.
    return run.model, rows | {"shift_labels": rows["labels"]}


def compare(
    size: Size, steps: int, rounds: int, threads: int, text: Path, folder: Path
) -> dict[str, Any]:
    """Train both, step by step in turns, several times.

    Raises:
        ValueError: where the models differ in parameters, or in the loss of the first step.
    """
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    for number in range(rounds):
        place = folder / f"{size.name}-{number}"
        sides = {
            side: (side, size, our_config(size, steps, text, place / side), threads)
            for side in (SIDES if number % 2 == 0 else reversed(SIDES))
        }
        for side, run in race(sides).items():
            runs[side].append(run)
    first = {side: done[0] for side, done in runs.items()}
    if first["ours"].parameters != first["theirs"].parameters:
        raise ValueError(f"{size.name}: the models differ in parameters")
    difference = abs(first["ours"].losses[0] - first["theirs"].losses[0])
    if difference > LOSS_TOLERANCE:
        raise ValueError(f"{size.name}: the first losses differ by {difference}")
    return {"size": size, "difference_of_first_loss": difference, **summary(size, runs)}


def race(sides: Mapping[str, tuple]) -> dict[str, Run]:
    """Run every side in a process, a step of each in turn; the values are arguments of `train`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memlm.training"])
    processes, turns = [], {}
    try:
        for side, arguments in sides.items():
            turns[side], far = context.Pipe()
            processes.append(context.Process(target=train, args=(far, *arguments)))
            processes[-1].start()
            far.close()  # a side that dies then ends the conversation
        results: dict[str, Run] = {}
        while len(results) < len(sides):
            for side in [side for side in sides if side not in results]:
                turns[side].send(None)
                said = turns[side].recv()
                if said is not None:
                    results[side] = said
        for process in processes:
            process.join()
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()


def train(turns: Connection, side: str, size: Size, config: RunConfig, threads: int) -> None:
    """Train one side in this process; every step waits for a message and is answered by one."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(threads)
    waited = False

    def wait() -> None:
        nonlocal waited
        if waited:
            turns.send(None)
        waited = True
        turns.recv()

    run = train_ours(config, wait) if side == "ours" else train_theirs(size, config, wait)
    turns.send(run)


def summary(size: Size, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Throughputs, their ratios and where our time goes: medians over the rounds."""

    def rates(side: str, field: str) -> list[float]:
        return [size.tokens / getattr(run, field) for run in runs[side]]

    def ratios(field: str) -> list[float]:
        both = zip(rates("ours", field), rates("theirs", field), strict=True)
        return [ours / theirs for ours, theirs in both]

    shares = {
        name: statistics.median(run.pieces[name] / run.seconds for run in runs["ours"])
        for name in PIECES
    }
    return {
        "parameters": runs["ours"][0].parameters,
        "tokens_per_second": {s: statistics.median(rates(s, "seconds")) for s in runs},
        "tokens_per_cpu_second": {s: statistics.median(rates(s, "cpu_seconds")) for s in runs},
        "ratio": statistics.median(ratios("seconds")),
        "ratios": ratios("seconds"),
        "cpu_ratio": statistics.median(ratios("cpu_seconds")),
        "cpu_ratios": ratios("cpu_seconds"),
        "shares": shares | {"other": 1 - sum(shares.values())},
        "rows_and_log": statistics.median(
            (run.pieces["rows"] + run.pieces["log"]) / run.seconds for run in runs["ours"]
        ),
        "last_loss": {side: statistics.median(r.losses[-1] for r in runs[side]) for side in runs},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the tables; 1 where ours is slower, or waits or logs too long."""
    parser = argparse.ArgumentParser(prog="benchmarks.train_throughput")
    parser.add_argument("--device", choices=("cpu",), required=True)
    parser.add_argument("--sizes", nargs="+", choices=[s.name for s in SIZES], help="default: all")
    parser.add_argument("--steps", type=positive, default=30, help="of each run")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    if options.steps < DROPPED + 2:
        parser.error(f"--steps: at least {DROPPED + 2}")
    chosen = [size for size in SIZES if options.sizes is None or size.name in options.sizes]
    results = {}
    with tempfile.TemporaryDirectory(prefix="memlm-throughput-") as name:
        text = write_text(Path(name) / "text.txt")
        for size in chosen:
            results[size.name] = compare(
                size, options.steps, options.rounds, options.threads, text, Path(name)
            )
            print(f"{tables({size.name: results[size.name]})}\n", flush=True)
    print(tables(results))
    found = {
        "machine": {**report.machine(), "threads": options.threads},
        "steps": options.steps,
        "rounds": options.rounds,
        "needed": NEEDED,
        "largest_share": LARGEST_SHARE,
        "sizes": results,
    }
    path = options.output / report.machine_name() / "train_throughput.json"
    print(report.save_json(found, path))
    fine = all(
        entry["ratio"] >= NEEDED and entry["rows_and_log"] <= LARGEST_SHARE
        for entry in results.values()
    )
    return 0 if fine else 1


def write_text(path: Path) -> Path:
    """One long document, so that rows have no borders in them: sources of memlm and torch."""
    folders = (Path(torch.nn.__file__).parent, Path(torch.optim.__file__).parent)
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    path.write_text(text, encoding="utf-8")
    return path


def tables(results: dict[str, dict[str, Any]]) -> str:
    """Throughputs, and the shares of our step, for a reader."""
    header = ("size", "parameters", "tokens/s", "Trainer's", "ratio", "in CPU time")
    rows = [
        (
            name,
            entry["parameters"],
            *entry["tokens_per_second"].values(),
            entry["ratio"],
            entry["cpu_ratio"],
        )
        for name, entry in results.items()
    ]
    shares = [
        (name, *(f"{share:.2%}" for share in entry["shares"].values()))
        for name, entry in results.items()
    ]
    pieces = ("of our step", *PIECES, "other")
    return f"{report.table(header, rows)}\n\n{report.table(pieces, shares)}"


if __name__ == "__main__":
    sys.exit(main())
