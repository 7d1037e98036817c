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
    "chomsky_even_pairs": ("chomsky.regular", "EvenPairs"),
    "chomsky_modular_arithmetic": ("chomsky.regular", "ModularArithmetic"),
    "chomsky_parity_check": ("chomsky.regular", "ParityCheck"),
    "chomsky_cycle_navigation": ("chomsky.regular", "CycleNavigation"),
    "chomsky_stack_manipulation": ("chomsky.context_free", "StackManipulation"),
    "chomsky_reverse_string": ("chomsky.context_free", "ReverseString"),
    "chomsky_modular_arithmetic_brackets": ("chomsky.context_free", "ModularArithmeticBrackets"),
    "chomsky_solve_equation": ("chomsky.context_free", "SolveEquation"),
    "chomsky_duplicate_string": ("chomsky.context_sensitive", "DuplicateString"),
    "chomsky_missing_duplicate": ("chomsky.context_sensitive", "MissingDuplicate"),
    "chomsky_odds_first": ("chomsky.context_sensitive", "OddsFirst"),
    "chomsky_binary_addition": ("chomsky.context_sensitive", "BinaryAddition"),
    "chomsky_binary_multiplication": ("chomsky.context_sensitive", "BinaryMultiplication"),
    "chomsky_compute_sqrt": ("chomsky.context_sensitive", "ComputeSqrt"),
    "chomsky_bucket_sort": ("chomsky.context_sensitive", "BucketSort"),
}


def generator_class(name: str) -> type[Generator]:
    """The class of the task `name` of `GENERATORS`."""
    module, generator = GENERATORS[name]
    return getattr(import_module(f"memlm.data.synthetic.{module}"), generator)
