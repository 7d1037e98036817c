"""The training loop."""

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from memlm.config import RunConfig, Stage
from memlm.layers.moe import set_balance_scale
from memlm.training.clipping import clip_gradients
from memlm.training.dead_keys import DeadKeys
from memlm.training.evaluation import Evaluation, average_statistics
from memlm.training.feed import RowFeed
from memlm.training.guards import StepGuard
from memlm.training.heap import keep_freed_memory
from memlm.training.held_out import HeldOut
from memlm.training.interrupt import Interruption
from memlm.training.lanes import Lanes
from memlm.training.logs import RunLog, bits, start_trackers
from memlm.training.loss import RowLoss, group_coefficients, group_counts, total
from memlm.training.optimizer import build_optimizers, set_learning_rates, table_updates
from memlm.training.plot import plot_run
from memlm.training.replay import row_passes
from memlm.training.report import Report, StepResult, opening
from memlm.training.retention import checkpoint_path, set_aside_later
from memlm.training.row_shares import share_rows
from memlm.training.run_folder import create_folder, find_start
from memlm.training.saving import restore, save_checkpoint, save_model
from memlm.training.schedule import CurriculumState, learning_rate_factor
from memlm.training.setup import (
    build_accelerator,
    build_inputs,
    prepare,
    share_tables,
    starts_empty,
)
from memlm.training.together import on_each, on_main
from memlm.training.updates import UpdateLog
from memlm.training.usage import UsageLog
from memlm.training.zero2 import accumulation


@dataclass
class TrainSummary:
    """What a run came to.

    Attributes:
        output_dir: the run folder; it holds the final model.
        steps: steps done in all.
        loss: loss of the last step; NaN when a resumed run had none left.
        before, after: held-out evaluation (see `Trainer.evaluate`), None without held-out rows.
        seconds: time in training steps, earlier parts of a resumed run included.
        tokens_per_second: over those seconds.
        interrupted: a signal ended the run early; a checkpoint holds where it stands.
    """

    output_dir: Path
    steps: int
    loss: float
    before: dict[str, float] | None
    after: dict[str, float] | None
    seconds: float
    tokens_per_second: float
    interrupted: bool = False


class Trainer:
    """Trains the model of a run config.

    A step is the same whatever the number of processes and micro-batches: its rows are given by
    the step, each group's loss is divided by the group's targets in the whole step, and the
    gradient is the sum. After `run`, `model` and `tokenizer` hold the result.

    Args:
        config: the run.
        resume: False starts a new run; True continues the run's newest whole checkpoint; "auto"
            does too, or starts a new run where there is none; a path continues that checkpoint,
            or the newest whole one of that run folder.
        accelerator: of `build_accelerator`; None = it is built here.

    Raises:
        UserError: for a run folder that is in use, data or sizes that do not fit, a checkpoint
            that does not fit, or another number of processes than the launcher was asked for.
    """

    def __init__(
        self,
        config: RunConfig,
        resume: bool | str | Path = False,
        accelerator: Accelerator | None = None,
    ):
        self.config, self.options = config, config.train
        self.folder = config.output_dir
        self.stages = self.options.stages()
        self.accelerator = accelerator or build_accelerator(config)
        source = on_main(self.accelerator, lambda: find_start(config, resume))
        empty = starts_empty(self.accelerator, source)
        self.tokenizer, self.dataset, held_out, model = on_each(
            self.accelerator, lambda: build_inputs(config, source, empty)
        )
        share_tables(self.accelerator, model, self.options)
        self.shares = share_rows(
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.options.sequence_parallel,
        )
        self.table_updates = table_updates(model, self.options)
        self.row_loss, *self.optimizers = prepare(
            self.accelerator,
            RowLoss(model, len(self.dataset.sources), self.options.z_loss),
            build_optimizers(model, self.options),
        )
        self.passes = row_passes(self.options, self.accelerator, self.row_loss)
        # Without DDP's wrapper; FSDP2 shards the module itself.
        self.plain_loss = self.accelerator.unwrap_model(self.row_loss)
        self.model: PreTrainedModel = self.plain_loss.model
        for stage in self.stages:  # a window that does not fit should not end a run half-way
            self.model.set_attention_window(stage.window)
        if self.shares.group is not None:
            self.model.set_sequence_group(self.shares.group)
        rows = None
        if held_out is not None:
            rows = HeldOut(held_out, self.options, self.accelerator, self.shares)
        self.evaluation = Evaluation(
            self.plain_loss, self.tokenizer, rows, self.options, self.accelerator
        )

        self.updates = UpdateLog(self.model, self.accelerator)
        every = self.options.reinit_keys_after
        self.usage = UsageLog(self.model, self.accelerator, half_keys=every is not None)
        self.dead_keys = DeadKeys(self.usage, self.optimizers, every, self.options.seed)
        self.guard = StepGuard(
            self.model,
            self.optimizers,
            self.accelerator,
            self.folder,
            self.options.max_skipped_steps,
            self.shares,
        )
        self.step = 0
        self.curriculum = CurriculumState()
        self.before: dict[str, float] | None = None
        self.seconds = 0.0
        self.evaluation_due = False
        self.feed: RowFeed | None = None
        if source is not None:
            restore(self, source)
        else:
            self.start_stage()
        start_trackers(self.accelerator, config)
        create_folder(config, self.accelerator, source)

    # --- stages ---

    @property
    def stage(self) -> Stage:
        """The current stage of the curriculum."""
        return self.stages[self.curriculum.stage]

    @property
    def finished(self) -> bool:
        """Whether no step is left: all are done, or the answers of the last stage are solved."""
        last = self.curriculum.stage == len(self.stages) - 1
        solved = last and self.curriculum.solved(self.options.stop_answer_bits)
        return solved or self.step == self.options.steps

    def _rows(self, stage: Stage) -> int:
        return self.options.tokens_per_step // stage.length

    def start_stage(self) -> None:
        """Read rows of the current stage from the current step on; no lane carries a state."""
        stage, rows = self.stage, self._rows(self.stage)
        if self.feed is not None:
            self.feed.close()
        dataset = self.dataset.with_length(stage.length, stage.digits, lanes=rows)
        self.feed = RowFeed(dataset, rows, self.shares.number, self.shares.count)
        self.lanes = Lanes(
            self.feed.first, self.feed.share, self.options.micro_batch_rows, self.shares.first
        )
        self.model.set_attention_window(stage.window)

    # --- a step ---

    def run(self, interruption: Interruption | None = None, plot: bool = True) -> TrainSummary:
        """Train until no step is left, evaluate, and save the model in the run folder.

        Args:
            interruption: ends the run after the step in which it noted a signal, with a
                checkpoint; None = signals do what they do elsewhere.
            plot: draw the run's curves at the end.

        Raises:
            UserError: when the disk is full, or training cannot go on.
        """
        silent = not self.accelerator.is_main_process
        log = on_each(
            self.accelerator,
            lambda: RunLog(self.folder, self.options.steps, self.step, silent, self.finished),
        )
        self.log = log
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        watched = (self.guard, self.updates, self.usage)
        self.report = Report(self.model, self.options, self.accelerator, log, *watched)
        parts = len(self.lanes.slices)
        now = opening(self.model, self.options, self.accelerator, self.stage.length, parts)
        resumed = f", from step {self.step}" if self.step else ""
        log.line(f"{self.folder}: {now}{resumed}")
        for update in self.table_updates:
            log.line(f"{update.name}: {update.method} ({update.reason})")
        on_main(self.accelerator, self._set_aside_later)
        after, loss, interrupted = None, math.nan, False
        try:
            if self.step == 0:
                self.before = self._evaluate_and_record()
            elif self.evaluation_due:
                after = self._evaluate_and_record()
            self.evaluation_due = False
            self.row_loss.train()
            while not self.finished and not interrupted:
                loss = self._one_step()
                interrupted = interruption is not None and interruption.agreed(self.accelerator)
                if self._due(self.options.evaluate_every):
                    # Whoever sent the signal may not wait as long as an evaluation takes.
                    self.evaluation_due = interrupted
                    if not interrupted:
                        after = self._evaluate_and_record()
                if interrupted or self._save_due():
                    save_checkpoint(self)
            if not interrupted:
                if after is None:  # an interrupted run that had done all its steps
                    after = self._evaluate_and_record()
                save_model(self)
        finally:
            self.feed.close()
            log.close()
        if plot and not interrupted:
            self._plot()
        self.accelerator.end_training()
        tokens = self.step * self.options.tokens_per_step
        rate = tokens / self.seconds if self.seconds else 0.0
        place = f"model in {self.folder}"
        if interrupted:
            place = (
                f"stopped by a signal, all of it is in "
                f"{checkpoint_path(self.folder, self.step)}; go on with --resume"
            )
        log.line(
            f"trained {self.step} steps in {self.seconds:.0f} s ({rate:.0f} tokens/s); {place}"
        )
        return TrainSummary(
            self.folder, self.step, loss, self.before, after, self.seconds, rate, interrupted
        )

    def _save_due(self) -> bool:
        keep = self.options.keep_every
        return self._due(self.options.save_every) or (keep > 0 and self.step % keep == 0)

    def _set_aside_later(self) -> None:
        for path in set_aside_later(self.folder, self.step):
            self.log.line(f"{path}: a checkpoint after step {self.step}, which the run repeats")

    def _due(self, every: int) -> bool:
        return self.finished or (every > 0 and self.step % every == 0)

    def _one_step(self) -> float:
        """Do one step; returns its loss."""
        options, accelerator = self.options, self.accelerator
        started = time.perf_counter()
        self._seed()
        whole = self.feed.get(self.step)
        batch = self.shares.own_targets(whole)
        data_seconds = time.perf_counter() - started
        counts = total(group_counts(batch, len(self.dataset.sources)), accelerator)
        coefficients = group_coefficients(counts, options.loss_weights).to(accelerator.device)
        # Data parallelism averages the gradients; the sum is wanted.
        scale = coefficients * accelerator.num_processes
        set_balance_scale(self.model, 1 / batch["labels"].numel())
        factor = learning_rate_factor(
            self.step,
            options.steps,
            options.warmup_steps,
            options.final_learning_rate,
            options.schedule,
            options.decay_fraction,
        )
        set_learning_rates(self.optimizers, factor)

        undo = self.guard.remember(self.lanes, self.updates, self.usage)
        sums = torch.zeros_like(coefficients)
        for index, rows in enumerate(self.lanes.slices):
            last = index == len(self.lanes.slices) - 1
            part = {name: row[rows].to(accelerator.device) for name, row in batch.items()}
            with accumulation(accelerator, self.row_loss, last):
                with self.report.watch(self.step + 1):
                    losses, states = self.passes.forward(part, self.lanes.states[index], scale)
                self.passes.backward()
            self.lanes.states[index] = states
            sums += losses
        sums = total(sums, accelerator)
        loss = float((sums * coefficients).sum())
        grad_norm = clip_gradients(
            self.row_loss.parameters(), self.optimizers, options.clip_norm or math.inf
        )
        made = self.guard.passes(loss, grad_norm)
        if made:
            for optimizer in self.optimizers:
                optimizer.step()
        else:
            line = self.guard.skip(self.step + 1, whole, loss, grad_norm, self.updates)
            self.log.line(line)
            undo()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

        self.step += 1
        self.report.settle(self.step, made)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        names = self.dataset.source_names
        group_bits = bits(sums.tolist(), counts.tolist(), names) if made else {}
        rate, stage = options.learning_rate * factor, self.curriculum.stage
        answer = group_bits.get("answer_bits")
        advanced = self.curriculum.advance(self.stages, self.step, options.steps, answer)
        times = (seconds, data_seconds)
        self.report.after_step(
            StepResult(self.step, made, loss, grad_norm, group_bits, *times, rate, stage),
            last=self.finished,
        )
        for line in self.dead_keys.after_step(self.step, last=self.finished):
            self.log.line(line)
        if advanced:
            self.start_stage()
        return loss

    def _seed(self) -> None:
        """Random numbers of a step depend on (seed, step, process), so none need saving."""
        name = f"{self.options.seed} {self.step} {self.accelerator.process_index}"
        # Hashed: torch's generator on the CPU takes only the lower 32 bits of a seed.
        torch.manual_seed(random.Random(name).getrandbits(63))

    # --- evaluation ---

    def evaluate(self, use_memory: bool = True) -> dict[str, float]:
        """Loss on the held-out rows; see `Evaluation.held_out_loss`."""
        return self.evaluation.held_out_loss(use_memory)

    def _evaluate_and_record(self) -> dict[str, float] | None:
        return self.evaluation.run(self.step, self.log, self.report.track)

    def average_statistics(self) -> None:
        """Give evaluation and checkpoints the running statistics of all processes' tokens."""
        average_statistics(self.model, self.accelerator)

    def _plot(self) -> None:
        if self.accelerator.is_main_process:
            plot_run(self.folder, self.usage)
