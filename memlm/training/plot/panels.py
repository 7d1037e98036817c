"""Which pictures the metrics of some runs make, and what is in each."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib import import_module

from memlm.config import LOSS_GROUPS
from memlm.evaluation.config import ALL_CONDITIONS
from memlm.evaluation.plots.style import tick_text
from memlm.evaluation.tasks import TASKS
from memlm.training.logs import LN2
from memlm.training.plot.runs import LONG, Curve, Run, mean_curve

TRAINING, HELD_OUT = "training", "held-out"
BITS = "bits per token"
_OFF = "_off"


@dataclass(frozen=True)
class Line:
    """A curve of a panel.

    Attributes:
        run: number of the run.
        kind: training, held-out, or a condition.
        curve: what is drawn.
        site: of a single memory, drawn thin; None = of the run as a whole.
    """

    run: int
    kind: str
    curve: Curve
    site: str | None = None


@dataclass
class Panel:
    """One picture.

    Attributes:
        section: where it stands.
        title: above it.
        unit: of its values.
        lines: its curves.
        scale: linear, or log where the values allow it.
        factor: what the values are multiplied with.
        shares: whether it goes from 0 to 100 %.
        zero: whether it has to show 0.
        smooth: whether long curves of training get a running mean.
        jumps: whether a value holds until the next one.
        first_step: where its steps begin; earlier ones of its curves are not shown.
    """

    section: str
    title: str
    unit: str = ""
    lines: list[Line] = field(default_factory=list)
    scale: str = "linear"
    factor: float = 1.0
    shares: bool = False
    zero: bool = False
    smooth: bool = True
    jumps: bool = False
    first_step: float = 0.0


_PERCENT = {"unit": "%", "factor": 100.0}
# Metrics of a step, in the order of the pictures.
_KNOWN = {
    "learning_rate": Panel("Steps", "Learning rate of AdamW or SPAM", zero=True, smooth=False),
    "grad_norm": Panel("Steps", "Gradient norm before clipping", scale="log"),
    "skipped_steps": Panel("Steps", "Skipped steps so far", "steps", zero=True, jumps=True),
    "length": Panel("Steps", "Length of a row", "tokens", zero=True, jumps=True),
    "tokens_per_second": Panel("Speed", "Speed", "tokens per second", zero=True),
    "mfu": Panel("Speed", "Use of the device's peak (MFU)", **_PERCENT, zero=True),
    "step_seconds": Panel("Speed", "Time of a step", "seconds", zero=True),
    "data_seconds": Panel("Speed", "Waiting for rows, per step", "ms", factor=1e3, zero=True),
    "log_seconds": Panel("Speed", "Telling of steps, per step", "ms", factor=1e3, zero=True),
    "memory_bytes": Panel("Speed", "Memory, at most", "GB", factor=1e-9, zero=True, smooth=False),
}
# Metrics of a memory, by what follows the name of its site.
_KNOWN_OF_SITES = {
    "gate_mean": Panel("Memories", "Size of the gates", "mean of tokens"),
    "gain_mean": Panel("Memories", "Size of the gain on the branch", "mean of channels"),
    "state_norm": Panel("Memories", "Size of what is remembered", "root mean square", scale="log"),
    "surprise": Panel("Memories", "Surprise", "loss of the memory", scale="log"),
    "fill": Panel("Memories", "Filled slots of the stores", **_PERCENT, shares=True),
    "clipped": Panel("Memories", "Clipped updates", **_PERCENT, zero=True),
    "used": Panel("Memories", "Slots that were read", **_PERCENT, shares=True),
    "kl_to_uniform": Panel("Memories", "Reads: divergence from uniform", "nats", zero=True),
    "top1_mass": Panel("Memories", "Share of the most read 1 % of slots", **_PERCENT, shares=True),
    "reads_per_slot": Panel("Memories", "Reads per slot in a window", "reads", zero=True),
}
_SECTIONS = ("Loss", "Worth of the memory", "Recall", "Steps", "Memories", "Other", "Speed")
# Said by others, or no curve.
_LEFT_OUT = {"loss", "bits_per_byte", "stage", "window", "flops_per_token", "seconds_left"}


def panels(runs: list[Run]) -> list[Panel]:
    """All panels that have a curve, in the order of their sections.

    Of several memories a panel has the mean, and where there is a single run each of them too.
    """
    keys = list(
        dict.fromkeys(
            key for run in runs for part in (run.training, run.evaluations) for key in part
        )
    )
    found = [*_losses(runs, keys), *_worth(runs, keys), *_recall(runs, keys)]
    done = _LEFT_OUT | {"bits", *(f"{group}_bits" for group in LOSS_GROUPS)}
    rest = [key for key in keys if key not in done and "/" not in key]
    rest = [key for key in rest if not key.endswith(_OFF) and key != "bits_difference"]
    found += [panel for key in _KNOWN if key in rest and (panel := _known(runs, key))]
    sites = [key for key in rest if "." in key]
    suffixes = dict.fromkeys(key.rpartition(".")[2] for key in sites)
    ordered = [name for name in _KNOWN_OF_SITES if name in suffixes]
    ordered += [name for name in suffixes if name not in _KNOWN_OF_SITES]
    found += [
        _of_sites(runs, suffix, [key for key in sites if key.rpartition(".")[2] == suffix])
        for suffix in ordered
    ]
    others = [key for key in rest if key not in _KNOWN and "." not in key]
    found += [_both(runs, key, Panel("Other", key.replace("_", " "))) for key in others]
    found = [panel for panel in found if panel.lines]
    return sorted(found, key=lambda panel: _SECTIONS.index(panel.section))


def _both(runs: list[Run], key: str, panel: Panel) -> Panel:
    """`panel` with the curves of training and of evaluations."""
    for number, run in enumerate(runs):
        for kind, curves in ((TRAINING, run.training), (HELD_OUT, run.evaluations)):
            if key in curves:
                panel.lines.append(Line(number, kind, curves[key]))
    return panel


def _losses(runs: list[Run], keys: list[str]) -> Iterable[Panel]:
    groups = [group for group in LOSS_GROUPS if f"{group}_bits" in keys]
    for group in groups:
        name = f"Loss, {group}" if len(groups) > 1 else "Loss"
        panel = _both(runs, f"{group}_bits", Panel("Loss", name, BITS))
        yield panel
        yield _second_half(panel)
    if len(groups) != 1:
        yield _both(runs, "bits", Panel("Loss", "Loss, all targets", BITS))
    if _is_weighted(runs):
        yield _both(runs, "loss", Panel("Loss", "Weighted loss that is trained", "nats"))
    for key in keys:
        if key.startswith("source/") and key.endswith("/bits"):
            yield _both(runs, key, Panel("Loss", f"Loss, source {_source(key)}", BITS))


def _second_half(panel: Panel) -> Panel:
    """The later steps of a long panel, whose differences the first steps hide."""
    long = max((len(line.curve.steps) for line in panel.lines), default=0) > LONG
    middle = max((line.curve.steps[-1] for line in panel.lines), default=0) / 2
    lines = [line for line in panel.lines if long and line.curve.steps[-1] >= middle]
    return replace(panel, title=f"{panel.title}, later steps", lines=lines, first_step=middle)


def _is_weighted(runs: list[Run]) -> bool:
    """Whether any run trains something else than the mean over all targets."""
    for run in runs:
        bits = dict(zip(*_points(run.training.get("bits")), strict=True))
        for step, loss in zip(*_points(run.training.get("loss")), strict=True):
            if abs(loss / LN2 - bits.get(step, loss / LN2)) > 1e-3 * abs(loss / LN2) + 1e-6:
                return True
    return False


def _points(curve: Curve | None) -> tuple[list[float], list[float]]:
    return ([], []) if curve is None else (curve.steps, curve.values)


def _source(key: str) -> str:
    return key.removeprefix("source/").rpartition("/")[0]


def _worth(runs: list[Run], keys: list[str]) -> Iterable[Panel]:
    """Held-out losses with the memory on and off."""
    if "bits_difference" in keys:
        panel = Panel("Worth of the memory", "What the memory saves", BITS, zero=True)
        yield _both(runs, "bits_difference", panel)
    one_group = sum(f"{group}_bits" in keys for group in LOSS_GROUPS) < 2
    for key in keys:
        base = key.removesuffix(_OFF)
        if base == key or base == "bits_per_byte" or base not in keys:
            continue
        if one_group and base != "bits" and "/" not in base:
            continue  # the same as over all targets
        name = f"source {_source(base)}" if "/" in base else base.removesuffix("_bits")
        title = "Held-out loss" if base == "bits" else f"Held-out loss, {name}"
        panel = Panel("Worth of the memory", f"{title}, on and off", BITS)
        for number, run in enumerate(runs):
            for kind, found in (("on", base), ("off", key)):
                # Without an evaluation with the memory off there is nothing to compare.
                if found in run.evaluations and key in run.evaluations:
                    panel.lines.append(Line(number, kind, run.evaluations[found]))
        yield panel


def _recall(runs: list[Run], keys: list[str]) -> Iterable[Panel]:
    """The tasks of evaluations: `TASK/SETTING/CONDITION`, of losses the one over all positions."""
    parts = [key.split("/") for key in keys if key.count("/") == 2 and key[:7] != "source/"]
    spans = {task for task, setting, _ in parts if setting == "all"}
    for task, setting in dict.fromkeys((task, setting) for task, setting, _ in parts):
        if task in spans and setting != "all":
            continue
        kind, metric, axis = _task(task)
        name = "" if setting == "all" else f" at {tick_text(setting, axis)}"
        panel = Panel("Recall", f"{task}{name}", metric)
        if kind != "losses":
            panel.unit, panel.factor, panel.shares = "% right", 100.0, True
        for number, run in enumerate(runs):
            for condition in ALL_CONDITIONS:
                curve = run.evaluations.get(f"{task}/{setting}/{condition}")
                if curve:
                    panel.lines.append(Line(number, condition, curve))
        yield panel


def _task(name: str) -> tuple[str, str, str]:
    """Kind, metric and axis of a task."""
    if name not in TASKS:
        return "losses", "", ""
    module, task = TASKS[name]
    found = getattr(import_module(f"memlm.evaluation.tasks.{module}"), task)
    return found.kind, found.metric, found.axis


def _known(runs: list[Run], key: str) -> Panel | None:
    """The panel of a metric of steps; None where it says nothing."""
    values = [set(run.training[key].values) for run in runs if key in run.training]
    if key == "skipped_steps" and all(found == {0} for found in values):
        return None
    if key == "length" and all(len(found) == 1 for found in values):
        return None
    return _both(runs, key, replace(_KNOWN[key], lines=[]))


def _of_sites(runs: list[Run], suffix: str, keys: list[str]) -> Panel:
    known = _KNOWN_OF_SITES.get(suffix) or Panel("Memories", suffix.replace("_", " "))
    panel = replace(known, lines=[])
    for number, run in enumerate(runs):
        for kind, part in ((TRAINING, run.training), (HELD_OUT, run.evaluations)):
            curves = {key.rpartition(".")[0]: part[key] for key in keys if key in part}
            if len(runs) == 1:
                panel.lines += [Line(number, kind, curve, site) for site, curve in curves.items()]
            if curves and (len(runs) > 1 or len(curves) > 1):
                panel.lines.append(Line(number, kind, mean_curve(list(curves.values()))))
    if len(runs) > 1 and len(keys) > 1:
        panel.title += " (mean)"
    return panel
