"""What a run says about itself: metric records, one log line, trackers.

metrics.jsonl in the run folder has a JSON object per line: a record of a step (the first, the last
and every `log_every`-th, and those that were skipped), or of an evaluation (`evaluation` is true).
A number that is not finite, or that cannot be known, is null. Of a step:

- step, from 1; loss, as trained, in nats; bits, text_bits, answer_bits, source/NAME/bits: mean loss
  per target, over all, of each loss group and of each source where there are several; all of this
  one step, over all processes and micro-batches.
- learning_rate (of AdamW or SPAM); grad_norm, before clipping; skipped_steps, so far.
- stage of the curriculum from 0, length of its rows, window.
- tokens_per_second, flops_per_token (see `throughput.training_flops`) and mfu, the share of the
  device's peak from 0 to 1, null where the peak is not known; step_seconds per step and of these
  data_seconds, waiting for rows, and log_seconds, telling of steps: means over the steps since the
  record before, evaluations and checkpoints left out, of the slowest process.
- memory_bytes: the most that tensors took on a device so far, or on a CPU what a process holds, of
  the process with the most.
- seconds_left: to the last step at the pace of the latest steps, without evaluations.
- SITE.NAME of each memory: see `memory_metrics.MemoryMetrics`, `usage.UsageLog` and
  `updates.UpdateLog`.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from memlm.config import LOSS_GROUPS, RunConfig
from memlm.errors import UserError, nearest
from memlm.files import append_line, recover, replace_file
from memlm.training.together import on_each

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
        ended: whether no step is left.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        step: int = 0,
        silent: bool = False,
        ended: bool = False,
    ):
        self.path, self.steps, self.silent = folder / METRICS_FILE, steps, silent
        self._bar: tqdm | None = None
        if not silent:
            _drop_after(self.path, step, ended)
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
        if self._bar is not None:
            self._bar.set_postfix_str(f"{_short(tokens_per_second)} tokens/s", refresh=False)
            self._bar.update()

    def record(self, metrics: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl.

        Raises:
            UserError: when the disk is full.
        """
        if not self.silent:
            known = {key: None if _unknown(value) else value for key, value in metrics.items()}
            append_line(self.path, json.dumps(known))

    def step_line(self, metrics: dict[str, Any], stages: int, device: str = "cpu") -> None:
        """The readable line of one step's metrics.

        Args:
            metrics: its record.
            stages: of the curriculum.
            device: name of the device, for one whose peak is not known.
        """
        step, mfu = metrics["step"], metrics["mfu"]
        groups = [name for name in LOSS_GROUPS if f"{name}_bits" in metrics]
        losses = "  ".join(f"{name} {metrics[f'{name}_bits']:.3f}" for name in groups)
        sources = {key: value for key, value in metrics.items() if key.startswith("source/")}
        by_source = ", ".join(f"{key.split('/')[1]} {value:.3f}" for key, value in sources.items())
        stage = f"  stage {metrics['stage'] + 1}/{stages}" if stages > 1 else ""
        window = f":{metrics['window']}" if metrics["window"] else ""
        skipped = f"  skipped {metrics['skipped_steps']}" if metrics.get("skipped_steps") else ""
        left = metrics["seconds_left"]
        self.line(
            f"step {step:>{len(str(self.steps))}}/{self.steps} ({100 * step // self.steps:>3} %)  "
            f"loss {metrics['loss']:.4f}  {losses} bits{f' ({by_source})' if by_source else ''}  "
            f"lr {metrics['learning_rate']:.2e}  "
            f"grad {metrics['grad_norm']:.2f}{skipped}{stage}  length {metrics['length']}{window}  "
            f"{_short(metrics['tokens_per_second'])} tokens/s  "
            f"MFU {f'n/a ({device})' if mfu is None else f'{100 * mfu:.1f} %'}  "
            f"{metrics['memory_bytes'] / 1e9:.2f} GB  left {'?' if left is None else _clock(left)}"
        )

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
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


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


def _unknown(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


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


def start_trackers(accelerator: Accelerator, config: RunConfig) -> None:
    """Begin to log to the trackers of a run; collective.

    Raises:
        UserError: when one of them does not start, as without a login or a connection.
    """
    names = config.train.trackers

    def start() -> None:
        try:
            accelerator.init_trackers("memlm", config=flat_config(config))
        except Exception as error:  # whatever other people's code may raise
            listed = ", ".join(map(repr, names))
            named = listed if len(names) == 1 else f"one of {listed}"
            reason = next(filter(None, str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"train.trackers: {named} did not start ({reason})") from error

    if names:
        on_each(accelerator, start)


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
