"""Conversations of any length in SCBench's format, made without its data.

The tasks are those of Li et al., 2024, arXiv:2412.10319; the inputs of mf are the published ones
(of InfiniteBench, Zhang et al., 2024, arXiv:2402.13718, see NOTICE), those of vt are RULER's, the
others are our own words. What differs from the published rows:

- mf: numbers are all different and from a range that grows with the list, where those of
  InfiniteBench are 0 to 99 and the largest of a long list is always 99.
- many_shot: there, questions of BIG-Bench Hard, which a model may answer without the shots. Here
  objects have four properties, one of which decides their class; which one, and how, is drawn for
  each context and can only be learned from its examples. No object that is asked for is shown.
- vt: one chain of five variables per turn, without RULER's example.
"""

import itertools
import json
import math
import string
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from memlm.evaluation.scbench.conversation import Conversation, Turn
from memlm.evaluation.tasks.ruler import TEMPLATES
from memlm.evaluation.tasks.ruler_vt import HOPS, chain_lines, scatter_lines

_LETTERS = list(string.ascii_lowercase)
_ENDS, _MIDDLE = 6, 12  # letters of a prefix, of a suffix, and between them
_NAME = 5  # letters of a variable

PROPERTIES = (
    ("size", ("tiny", "small", "middling", "large", "huge")),
    ("colour", ("red", "green", "blue", "white", "black")),
    ("shape", ("round", "square", "flat", "long", "curved")),
    ("material", ("wooden", "iron", "glass", "paper", "stone")),
)
_CLASSES = ("(A)", "(B)", "(C)", "(D)", "(E)")


@dataclass(frozen=True)
class ScbenchGenerator:
    """How conversations of a task are made.

    Attributes:
        make: from a size, a number of turns and random numbers; the same arguments give the same.
        least: the smallest size for a number of turns.
        most_turns: the largest number of turns.
    """

    make: Callable[[int, int, np.random.Generator], Conversation]
    least: Callable[[int], int]
    most_turns: int = 100


def key_values(size: int, turns: int, rng: np.random.Generator) -> Conversation:
    """A JSON object of `size` random keys and values; turns ask for different keys."""
    pairs = {_uuid(rng): _uuid(rng) for _ in range(size)}
    keys = list(pairs)
    asked = [keys[place] for place in rng.choice(size, turns, replace=False)]
    return Conversation(
        json.dumps(pairs),
        tuple(
            Turn(
                f'Key: "{key}"\nThe value associated with the specified key is: ',
                (pairs[key],),
                task="scbench_kv",
            )
            for key in asked
        ),
    )


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def prefix_suffix(size: int, turns: int, rng: np.random.Generator) -> Conversation:
    """`size` random strings; turns ask for the one with a prefix and a suffix.

    Most prefixes and suffixes belong to several strings, every pair to one at most.
    """
    ends = max(2, math.ceil(math.sqrt(2 * size)))
    prefixes, suffixes = (_different_words(ends, _ENDS, rng) for _ in range(2))
    pairs = [divmod(int(pair), ends) for pair in rng.choice(ends * ends, size, replace=False)]
    strings = [
        prefixes[start] + "".join(rng.choice(_LETTERS, _MIDDLE)) + suffixes[end]
        for start, end in pairs
    ]
    asked = rng.choice(size, turns, replace=False)
    listed = "\n".join(strings)
    return Conversation(
        "Below is a list of strings, one per line. Memorize them. I will give you a prefix and a "
        f"suffix and ask for the string that has both.\n\n{listed}",
        tuple(
            Turn(
                f'Prefix: "{strings[place][:_ENDS]}"\nSuffix: "{strings[place][-_ENDS:]}"\n'
                "The string with this prefix and this suffix is: ",
                (strings[place],),
                task="scbench_prefix_suffix",
            )
            for place in asked
        ),
    )


def _different_words(
    count: int, letters: int, rng: np.random.Generator, alphabet: list[str] = _LETTERS
) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choice(alphabet, letters))] = None
    return list(found)


def variable_tracking(size: int, turns: int, rng: np.random.Generator) -> Conversation:
    """A chain of assignments per turn, all mixed with `size` lines of noise."""
    length = HOPS + 1
    capitals = list(string.ascii_uppercase)
    names = _different_words(turns * length, _NAME, rng, capitals)
    values = [str(value) for value in rng.choice(np.arange(10000, 99999), turns, replace=False)]
    chains = [names[turn * length : (turn + 1) * length] for turn in range(turns)]
    waiting = [iter(chain_lines(chain, value)) for chain, value in zip(chains, values, strict=True)]
    # Lines of different chains in any order, those of one chain in theirs.
    order = rng.permutation(np.repeat(np.arange(turns), length))
    lines, _ = scatter_lines([next(waiting[chain]) for chain in order], size, rng)
    template = TEMPLATES["variable_tracking"]
    before, after = template.template.split("{context}")
    question = after.lstrip("\n") + template.answer_prefix
    return Conversation(
        before + "\n".join(lines),
        tuple(
            Turn(question.format(query=value, num_v=length), tuple(chain), task="scbench_vt")
            for chain, value in zip(chains, values, strict=True)
        ),
    )


_FINDS: dict[str, Callable[[list[int]], int]] = {
    "largest number": lambda ascending: ascending[-1],
    "second largest number": lambda ascending: ascending[-2],
    "third largest number": lambda ascending: ascending[-3],
    "smallest number": lambda ascending: ascending[0],
    "second smallest number": lambda ascending: ascending[1],
    "third smallest number": lambda ascending: ascending[2],
    "median number": lambda ascending: ascending[len(ascending) // 2],
}


def math_find(size: int, turns: int, rng: np.random.Generator) -> Conversation:
    """A list of 2 * size + 1 different numbers; turns ask for its extremes and its median."""
    count = 2 * size + 1
    numbers = rng.choice(10 * count, count, replace=False).tolist()
    ascending = sorted(numbers)
    asked = [list(_FINDS)[place] for place in rng.choice(len(_FINDS), turns, replace=False)]
    return Conversation(
        str(numbers),
        tuple(
            Turn(
                "You should answer with only one number, no other words. "
                f"The {name} of the list is: ",
                (str(_FINDS[name](ascending)),),
                task="scbench_mf",
            )
            for name in asked
        ),
    )


def many_shot(size: int, turns: int, rng: np.random.Generator) -> Conversation:
    """`size` objects with their classes; turns ask for the classes of others.

    The shots leave one property alone that can decide the class, and show every value of it.
    """
    deciding = int(rng.integers(len(PROPERTIES)))
    classes = rng.permutation(_CLASSES).tolist()
    every = list(itertools.product(*(range(len(values)) for _, values in PROPERTIES)))
    order = [every[place] for place in rng.permutation(len(every))]
    asked, rest = order[:turns], order[turns:]
    for shots in _draws(rest, size, rng):
        known = [(shot, classes[shot[deciding]]) for shot in shots]
        decide = [place for place in range(len(PROPERTIES)) if _decides(place, known)]
        if decide == [deciding] and len({label for _, label in known}) == len(_CLASSES):
            break
    listed = "\n\n".join(f"{_object(shot)} {label}" for shot, label in known)
    return Conversation(
        "Each object belongs to one of five classes. Learn from the examples which.\n\n" + listed,
        tuple(
            Turn(_object(one), (classes[one[deciding]],), task="scbench_many_shot") for one in asked
        ),
    )


def _draws(
    objects: list[tuple[int, ...]], size: int, rng: np.random.Generator
) -> Iterator[list[tuple[int, ...]]]:
    while True:
        yield [objects[place] for place in rng.integers(len(objects), size=size)]


def _decides(place: int, known: list[tuple[tuple[int, ...], str]]) -> bool:
    """Whether objects with the same value of a property are all of one class."""
    label: dict[int, str] = {}
    return all(label.setdefault(shot[place], one) == one for shot, one in known)


def _object(values: tuple[int, ...]) -> str:
    words = [
        f"{name}: {words[value]}" for (name, words), value in zip(PROPERTIES, values, strict=True)
    ]
    return f"Object: {', '.join(words)}\nClass:"


GENERATORS = {
    "scbench_kv": ScbenchGenerator(key_values, lambda turns: turns),
    "scbench_prefix_suffix": ScbenchGenerator(prefix_suffix, lambda turns: turns),
    "scbench_vt": ScbenchGenerator(variable_tracking, lambda turns: 0),
    "scbench_mf": ScbenchGenerator(math_find, lambda turns: 3, len(_FINDS)),
    "scbench_many_shot": ScbenchGenerator(many_shot, lambda turns: 15),
}
