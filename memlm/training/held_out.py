"""Loss on held-out rows during training."""

import torch
from accelerate import Accelerator

from memlm.config import LOSS_GROUPS, TrainConfig
from memlm.data import ByteTokenizer, PackedDataset
from memlm.training.feed import Batch, read_batch
from memlm.training.logs import bits
from memlm.training.loss import RowLoss, group_counts, total
from memlm.training.row_shares import RowShares


class HeldOut:
    """The first rows of the validation split, read once and shared out over the processes.

    Args:
        dataset: the validation split.
        options: with the number of rows, rounded up so that every process has as many.
        accelerator: the processes.
        shares: how they share rows.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        options: TrainConfig,
        accelerator: Accelerator,
        shares: RowShares,
    ):
        self.dataset, self.accelerator, self.shares = dataset, accelerator, shares
        self.share = -(-options.evaluation_rows // shares.count)
        in_a_step = options.tokens_per_step // options.stages()[-1].length
        # Most rows of one forward pass: as many as training has in its last stage.
        self.size = options.micro_batch_rows or in_a_step // shares.count
        self._batches: list[Batch] | None = None

    @torch.no_grad()
    def evaluate(self, row_loss: RowLoss, use_memory: bool = True) -> dict[str, float]:
        """Mean losses in bits; the training mode of `row_loss` is restored.

        Args:
            row_loss: the model's loss, without a data-parallel wrapper.
            use_memory: False = every memory switched off.

        Returns:
            bits (per target, over all targets), text_bits and answer_bits where there are such
            targets, source/NAME/bits of several sources, and bits_per_byte with the byte tokenizer.
        """
        device, training = self.accelerator.device, row_loss.training
        names = self.dataset.source_names
        sums = torch.zeros(len(names) * len(LOSS_GROUPS), device=device)
        counts = torch.zeros(len(sums), dtype=torch.int64)
        row_loss.eval()
        for batch in self._rows():
            counts += group_counts(batch, len(names))
            on_device = {name: row.to(device) for name, row in batch.items()}
            sums += row_loss(on_device, use_memory=use_memory)[1]
        row_loss.train(training)
        sums, counts = total(sums, self.accelerator), total(counts, self.accelerator)
        result = bits(sums.tolist(), counts.tolist(), names)
        if isinstance(self.dataset.tokenizer, ByteTokenizer):
            result["bits_per_byte"] = result["bits"]
        return result

    def _rows(self) -> list[Batch]:
        if self._batches is None:
            first = self.shares.number * self.share
            mine = range(first, first + self.share)
            self._batches = [
                self.shares.own_targets(read_batch(self.dataset, mine[start : start + self.size]))
                for start in range(0, self.share, self.size)
            ]
        return self._batches
