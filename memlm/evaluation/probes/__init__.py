"""What weights and attention of a trained model have learned, told apart by layer and head."""

from memlm.evaluation.probes.associative import AssociativeProbes, HeadProbes, probe_associations

__all__ = ["AssociativeProbes", "HeadProbes", "probe_associations"]
