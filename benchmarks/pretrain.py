"""Training steps of models with 340 million parameters: tokens per second, MFU, peak memory.

python -m benchmarks.pretrain --device cuda

A hybrid of gated delta rule and sliding attention, gated delta rule alone, and a transformer, of
about as many parameters, at 8k and 64k tokens per row; beside them the first two as
flash-linear-attention builds them, of the same sizes, with its fused loss. All take the same steps:
random tokens, bf16 autocast with float32 weights, AdamW fused. At 64k blocks are recomputed in the
backward pass, and so are those of flash-linear-attention. Each case is a process of its own, so
that one which runs out of memory ends no other.

Model FLOPs of a token are those of `memlm.training.throughput`, of the peers those of the model of
ours with the same sizes; MFU is their share of the device's peak by its data sheet. The peak of
memory is over all steps, with weights and moments.
"""

import argparse
import dataclasses
import importlib.util
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks import report
from benchmarks.library import describe, positive
from memlm.models import MemLMConfig, MemLMForCausalLM
from memlm.models.activations import set_activations
from memlm.models.interop import ARCHITECTURES
from memlm.training.loss import RowLoss
from memlm.training.replay import WholeRows
from memlm.training.throughput import device_name, peak_flops, training_flops

WARM_UP = 3  # steps, which compile and tune kernels
SECONDS = 600.0  # that a case may take
OURS, FLA = "memlm", "fla"


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes of the models, and of the steps.

    Attributes:
        intermediate_size, wide: of the feed-forward beside a memory, and of the transformer's,
            which gives it as many parameters.
        periods: times that three layers of gated delta rule and one of attention repeat.
        steps: length of a row to (rows, `train.activations`).
    """

    vocabulary: int
    hidden_size: int
    intermediate_size: int
    wide: int
    periods: int
    delta: dict[str, Any]
    heads: int
    window: int
    steps: dict[int, tuple[int, str]]

    def config(self, model: str) -> MemLMConfig:
        """Of the "hybrid", "gated_delta" or "transformer"."""
        delta = {"mixer": {"type": "gated_delta", **self.delta}, "ffn": "swiglu"}
        heads = {"num_heads": self.heads}
        local = {"type": "sliding_attention", "window": self.window, **heads}
        layers, width = [delta] * 4, self.intermediate_size
        if model == "hybrid":
            layers = [delta] * 3 + [{"mixer": local, "ffn": "swiglu"}]
        elif model == "transformer":
            layers = [{"mixer": {"type": "attention", **heads}, "ffn": "swiglu"}] * 4
            width = self.wide
        return MemLMConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden_size,
            intermediate_size=width,
            layers=layers * self.periods,
        )


PRESETS = {
    "340m": Preset(
        vocabulary=32000,
        hidden_size=1024,
        intermediate_size=2176,
        wide=2688,
        periods=6,
        delta={"num_heads": 6, "head_dim": 128},
        heads=16,
        window=512,
        steps={8192: (2, "keep"), 65536: (1, "recompute")},
    ),
    "tiny": Preset(
        vocabulary=97,
        hidden_size=32,
        intermediate_size=48,
        wide=64,
        periods=1,
        delta={"num_heads": 2, "head_dim": 12},
        heads=2,
        window=16,
        steps={32: (2, "keep"), 64: (1, "recompute")},
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
        preset: a name of PRESETS.
        side: OURS or FLA.
        model: as `Preset.config` calls it.
        length: tokens per row.
        device: "cuda" or "cpu".
        steps: that are timed.
    """

    preset: str
    side: str
    model: str
    length: int
    device: str
    steps: int

    @property
    def name(self) -> str:
        """For tables; of the attention of a transformer, what computes it."""
        kind = f" ({_attention(self.device)})" if self.model == "transformer" else ""
        return f"{self.side} {self.model}{kind}"


def _attention(device: str) -> str:
    flash = device == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


def cases(preset: str, device: str, steps: int) -> list[Case]:
    """All of a preset, those of one length behind one another."""
    models = [(side, model) for model in ("hybrid", "gated_delta") for side in (OURS, FLA)]
    models.append((OURS, "transformer"))
    lengths = PRESETS[preset].steps
    return [Case(preset, *model, length, device, steps) for length in lengths for model in models]


def refusal(case: Case) -> str | None:
    """Why a case cannot run here; None = it can."""
    if case.side == OURS:
        return None
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed"
    if case.device == "cpu":
        return "flash-linear-attention needs a GPU"
    if case.model == "hybrid" and importlib.util.find_spec("flash_attn") is None:
        return "the attention of flash-linear-attention needs flash_attn, which is not installed"
    return None


def measure(case: Case) -> dict[str, Any]:
    """Take the steps, in this process.

    Raises:
        torch.OutOfMemoryError: where they do not fit.
    """
    preset, device = PRESETS[case.preset], torch.device(case.device)
    rows, activations = preset.steps[case.length]
    precision = "bf16" if case.device == "cuda" else "no"
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=case.device == "cpu", mixed_precision=precision)
    build = _ours if case.side == OURS else _fla
    model, backward = build(case, activations, accelerator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    seconds, losses = [], []
    for _ in range(WARM_UP + case.steps):
        ids = torch.randint(preset.vocabulary, (rows, case.length), device=device)
        _wait(device)
        start = time.perf_counter()
        losses.append(backward(ids))
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    with torch.device("meta"):
        same = MemLMForCausalLM(preset.config(case.model))
    speed = rows * case.length / statistics.median(seconds[WARM_UP:])
    flops, peak = training_flops(same, case.length), peak_flops(device_name(device), precision)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "rows": rows,
        "activations": activations,
        "tokens_per_second": speed,
        "flops_per_token": flops,
        "mfu": None if peak is None else flops * speed / peak,
        "peak_memory": _peak_memory(device),
        "losses": [float(loss) for loss in losses],
    }


Backward = Callable[[Tensor], Tensor]


def _ours(case: Case, activations: str, accelerator: Accelerator) -> tuple[nn.Module, Backward]:
    """The model, and the passes of a step over tokens [B, T], which return its loss."""
    model = MemLMForCausalLM._from_config(
        PRESETS[case.preset].config(case.model), attn_implementation=_attention(case.device)
    )
    set_activations(model, activations)
    row_loss = accelerator.prepare_model(RowLoss(model)).train()
    passes = WholeRows(accelerator, row_loss, carry=False)

    def backward(ids: Tensor) -> Tensor:
        labels = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        targets = (labels != -100).sum()
        batch = {
            "input_ids": ids,
            "segment_ids": torch.ones_like(ids),
            "position_ids": torch.arange(ids.shape[1], device=ids.device).expand_as(ids),
            "labels": labels,
            "loss_groups": torch.zeros_like(ids),
        }
        sums, _ = passes.forward(batch, None, torch.ones(2, device=ids.device) / targets)
        passes.backward()
        return sums.sum() / targets

    return model, backward


def _fla(case: Case, activations: str, accelerator: Accelerator) -> tuple[nn.Module, Backward]:
    """The same of flash-linear-attention."""
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    ours = PRESETS[case.preset].config(case.model)
    values = ARCHITECTURES["gated_deltanet"].write_config(ours)
    config = GatedDeltaNetConfig(
        **values, fuse_cross_entropy=False, fuse_linear_cross_entropy=True, use_cache=False
    )
    model = GatedDeltaNetForCausalLM(config)
    if activations == "recompute":
        model.gradient_checkpointing_enable()
    prepared = accelerator.prepare_model(model).train()

    def backward(ids: Tensor) -> Tensor:
        loss = prepared(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        return loss.detach()

    return model, backward


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on a GPU, on a CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alone(case: Case) -> dict[str, Any]:
    """Measure in a process of its own; where it fails, `failed` says why."""
    reason = refusal(case)
    if reason is not None:
        return {"failed": reason}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memlm.training.main"])
    near, far = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(far, case))
    process.start()
    far.close()  # a process that dies then ends the conversation
    try:
        if near.poll(SECONDS):
            return near.recv()
        return {"failed": f"stopped after {SECONDS:.0f} s"}
    except EOFError:
        process.join()
        return {"failed": f"the process died ({process.exitcode})"}
    finally:
        process.kill()
        process.join()


def _report(connection: Connection, case: Case) -> None:
    try:
        connection.send(measure(case))
    except Exception as failure:
        connection.send({"failed": describe(failure)})


def table(results: Sequence[dict[str, Any]]) -> str:
    """What was measured, for a reader."""
    header = ("length", "model", "parameters", "tokens a step", "activations", "tokens/s")
    header += ("MFU", "peak memory, GiB", "failed")
    rows = []
    for entry in results:
        tokens = entry["rows"] * entry["length"] if "rows" in entry else None
        memory = entry["peak_memory"] / 2**30 if "rows" in entry else None
        found = [entry.get(key) for key in ("activations", "tokens_per_second", "mfu")]
        start = (entry["length"], entry["name"], entry.get("parameters"), tokens)
        rows.append((*start, *found, memory, entry.get("failed")))
    return report.table(header, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all cases and print the table; 1 where one of ours failed, 2 without the device."""
    parser = argparse.ArgumentParser(prog="benchmarks.pretrain")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="340m")
    parser.add_argument("--steps", type=positive, default=10, help="that are timed")
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("pretrain: torch finds no CUDA GPU", file=sys.stderr)
        return 2
    results = []
    for case in cases(options.preset, options.device, options.steps):
        results.append({"name": case.name, **dataclasses.asdict(case), **alone(case)})
        print(f"{case.name}, {case.length}: {results[-1].get('failed', 'measured')}", flush=True)
    print(f"\n{table(results)}")
    found = {"machine": report.machine(), "preset": PRESETS[options.preset], "cases": results}
    name = f"pretrain_{options.preset}_{options.device}.json"
    print(report.save_json(found, options.output / report.machine_name() / name))
    return int(any("failed" in entry for entry in results if entry["side"] == OURS))


if __name__ == "__main__":
    sys.exit(main())
