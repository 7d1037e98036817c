"""Pictures of runs: of one as it ends, and of several side by side (`python -m` this package)."""

from memlm.training.plot.picture import plot_metrics, plot_run, plot_usage

__all__ = ["plot_metrics", "plot_run", "plot_usage"]
