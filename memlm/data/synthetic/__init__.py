"""Synthetic tasks by name. A new one is a `Generator` in a file of this folder and a line here."""

from importlib import import_module

from memlm.data.synthetic.base import IGNORED, Example, Generator, accuracy
from memlm.data.synthetic.rows import SyntheticRows

__all__ = [
    "GENERATORS",
    "IGNORED",
    "Example",
    "Generator",
    "SyntheticRows",
    "accuracy",
    "generator_class",
]

GENERATORS = {
    "parity": ("parity", "Parity"),
    "associative_recall": ("associative_recall", "AssociativeRecall"),
    "induction": ("induction", "Induction"),
    "copying": ("copying", "Copying"),
    "selective_copying": ("copying", "SelectiveCopying"),
    "n_back": ("n_back", "NBack"),
    "facts": ("facts", "Facts"),
    "bigrams": ("bigrams", "Bigrams"),
    "random_projection": ("random_projection", "RandomProjection"),
    "group_word_problem": ("group_word_problem", "GroupWordProblem"),
}


def generator_class(name: str) -> type[Generator]:
    """The class of the task `name` of `GENERATORS`."""
    module, generator = GENERATORS[name]
    return getattr(import_module(f"memlm.data.synthetic.{module}"), generator)
