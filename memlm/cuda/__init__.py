"""Operations: one public function each, several implementations behind `memlm.cuda.dispatch`."""

from memlm.cuda.linear_recurrence import linear_recurrence
from memlm.cuda.neural_memory import NeuralMemoryState, neural_memory

__all__ = ["NeuralMemoryState", "linear_recurrence", "neural_memory"]
