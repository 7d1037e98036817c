"""Learning rate and curriculum as functions of the step."""

import math
from dataclasses import dataclass, field
from typing import Literal

from memlm.config import Stage

# Steps over which the answers' loss is averaged before it may end a stage, or the run.
ANSWER_STEPS = 8


def learning_rate_factor(
    step: int,
    steps: int,
    warmup_steps: int,
    final: float,
    schedule: Literal["cosine", "wsd"] = "cosine",
    decay_fraction: float = 0.1,
) -> float:
    """Factor on the learning rate of step 0 <= `step` < `steps`.

    Grows linearly to 1 over `warmup_steps`. Then "cosine" falls along a cosine, while "wsd" (Hu et
    al., 2024, MiniCPM, arXiv:2404.06395) stays at 1 until the last `decay_fraction` of all steps,
    in which it falls as 1 - sqrt(progress): the shape that Haegele et al., 2024 (arXiv:2405.18392)
    found best. Both reach `final` at the last step.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "wsd":
        decay_steps = min(max(1, round(decay_fraction * steps)), steps - warmup_steps)
        progress = max(0, step + 1 - (steps - decay_steps)) / decay_steps
        return final + (1 - final) * (1 - math.sqrt(min(progress, 1.0)))
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@dataclass
class CurriculumState:
    """Where a run stands in its curriculum.

    Attributes:
        stage: index of the current stage.
        answer_bits: loss of the answers in the stage's last steps, in bits per token.
    """

    stage: int = 0
    answer_bits: list[float] = field(default_factory=list)

    def advance(
        self, stages: list[Stage], step: int, steps: int, answer_bits: float | None
    ) -> bool:
        """Account for `step` steps done and leave the stage if it is over.

        Args:
            stages: the curriculum.
            step: steps done so far.
            steps: steps of the run.
            answer_bits: this step's loss of the answers; None when it had no answers.

        Returns:
            Whether a new stage begins.
        """
        if answer_bits is not None:
            self.answer_bits = [*self.answer_bits, answer_bits][-ANSWER_STEPS:]
        if self.stage == len(stages) - 1:
            return False
        stage = stages[self.stage]
        if not self.solved(stage.until_answer_bits) and step < stage.until * steps:
            return False
        self.stage += 1
        self.answer_bits = []
        return True

    def solved(self, bound: float | None) -> bool:
        """Whether the loss of the answers over the last ANSWER_STEPS steps is below `bound`."""
        return (
            bound is not None
            and len(self.answer_bits) == ANSWER_STEPS
            and sum(self.answer_bits) / ANSWER_STEPS < bound
        )
