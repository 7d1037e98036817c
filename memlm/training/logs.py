"""What a run says about itself: metric records, one log line, trackers and a picture."""

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from memlm.config import LOSS_GROUPS, RunConfig
from memlm.errors import UserError, nearest
from memlm.files import append_line, recover, replace_file

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "training.png"
LN2 = math.log(2)


def bits(sums: list[float], counts: list[float], sources: Sequence[str] = ()) -> dict[str, float]:
    """Mean loss per target in bits: over all targets, and of each group and source that has any.

    Args:
        sums: losses in nats of the groups; of several sources, of each source's groups in turn.
        counts: their targets.
        sources: the names of the sources.
    """
    parts = {f"{name}_bits": slice(n, None, len(LOSS_GROUPS)) for n, name in enumerate(LOSS_GROUPS)}
    if len(sources) > 1:
        for n, name in enumerate(sources):
            parts[f"source/{name}/bits"] = slice(n * len(LOSS_GROUPS), (n + 1) * len(LOSS_GROUPS))
    means = {"bits": sum(sums) / max(1.0, sum(counts)) / LN2}
    for name, part in parts.items():
        if sum(counts[part]):
            means[name] = sum(sums[part]) / sum(counts[part]) / LN2
    return means


class RunLog:
    """Writes metrics.jsonl, the progress bar and the log lines of one run.

    Args:
        folder: the run folder.
        steps: steps of the run.
        step: steps done already; later records of an interrupted run are dropped.
        silent: write nothing (every process but the first).
    """

    def __init__(self, folder: Path, steps: int, step: int = 0, silent: bool = False):
        self.path, self.steps, self.silent = folder / METRICS_FILE, steps, silent
        self._steps_done = step
        self._first_step: tuple[float, int] | None = None
        self._bar: tqdm | None = None
        if not silent:
            _drop_after(self.path, step, ended=step == steps)
            # On a terminal only: elsewhere the log lines say the same.
            self._bar = tqdm(
                total=steps, initial=step, unit="step", disable=None, leave=False, file=sys.stderr
            )

    def line(self, text: str) -> None:
        """Print one line above the progress bar."""
        if not self.silent:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def tick(self, tokens_per_second: float) -> None:
        """One step is done."""
        self._steps_done += 1
        if self._first_step is None:  # the first one warms up, and an evaluation may come before
            self._first_step = (time.perf_counter(), self._steps_done)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{_short(tokens_per_second)} tokens/s", refresh=False)
            self._bar.update()

    def record(self, metrics: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl.

        Raises:
            UserError: when the disk is full.
        """
        if not self.silent:
            append_line(self.path, json.dumps(metrics))

    def step_line(self, metrics: dict[str, Any], stages: int) -> None:
        """The readable line of one step's metrics."""
        step = metrics["step"]
        groups = [name for name in LOSS_GROUPS if f"{name}_bits" in metrics]
        losses = "  ".join(f"{name} {metrics[f'{name}_bits']:.3f}" for name in groups)
        stage = f"  stage {metrics['stage'] + 1}/{stages}" if stages > 1 else ""
        window = f":{metrics['window']}" if metrics["window"] else ""
        skipped = f"  skipped {metrics['skipped_steps']}" if metrics.get("skipped_steps") else ""
        self.line(
            f"step {step:>{len(str(self.steps))}}/{self.steps} ({100 * step // self.steps:>3} %)  "
            f"loss {metrics['loss']:.4f}  {losses} bits  lr {metrics['learning_rate']:.2e}  "
            f"grad {metrics['grad_norm']:.2f}{skipped}{stage}  length {metrics['length']}{window}  "
            f"{_short(metrics['tokens_per_second'])} tokens/s  left {self._left()}"
        )

    def _left(self) -> str:
        """Time to the last step, at the mean speed so far."""
        if self._first_step is None or self._first_step[1] == self._steps_done:
            return "?"
        started, first = self._first_step
        pace = (time.perf_counter() - started) / (self._steps_done - first)
        return _clock(pace * (self.steps - self._steps_done))

    def close(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl, in order, without a last one that a kill cut off.

    Raises:
        UserError: naming a line that is no record.
    """
    # Bytes: the cut may be in the middle of a character.
    *lines, last = path.read_bytes().split(b"\n")
    if _record(last) is not None:
        lines.append(last)
    records = [_record(line) for line in lines]
    if None in records:
        number = records.index(None) + 1
        raise UserError(f"{path}: line {number} is no record of a run; delete it to go on")
    return records


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


def _drop_after(path: Path, step: int, ended: bool) -> None:
    """Drop what the run records again: later steps, and its last evaluation if it had `ended`.

    A run at its start has no records yet.
    """
    recover(path.parent, path.name)
    if path.exists():
        kept = [
            record
            for record in read_metrics(path)
            if 0 < step >= record["step"]
            and not (ended and record["step"] == step and record.get("evaluation"))
        ]
        replace_file(path, "".join(json.dumps(record) + "\n" for record in kept))


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def check_trackers(names: list[str]) -> None:
    """Raise UserError for a tracker that accelerate does not know or that is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [tracker.value for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            valid = ", ".join(LOGGER_TYPE_TO_CLASS)
            hint = nearest(name, LOGGER_TYPE_TO_CLASS) or f" (valid: {valid})"
            raise UserError(f"train.trackers: unknown tracker {name!r}{hint}")
        if name not in available:
            raise UserError(f"train.trackers: {name!r} is not installed: pip install {name}")


def flat_config(config: RunConfig) -> dict[str, str | int | float | bool]:
    """The config by dotted key, as trackers take it."""
    flat: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                add(f"{prefix}.{key}" if prefix else key, item)
        else:
            flat[prefix] = value if isinstance(value, str | int | float | bool) else str(value)

    add("", config.to_dict())
    return flat
