"""Operations: one public function each, several implementations behind `memlm.cuda.dispatch`."""

from memlm.cuda.linear_recurrence import linear_recurrence

__all__ = ["linear_recurrence"]
