"""Stories with a question in the manner of bAbI, made without its files.

The 20 question types are those of bAbI (Weston et al., "Towards AI-Complete Question Answering",
2015, arXiv:1502.05698), with its vocabulary, sentence forms and lengths, so that BABILong's labels
hold. Unlike some of bAbI's, every question has one answer that follows from the facts (for type 20
with the common knowledge that the hungry go to the kitchen).
"""

import numpy as np

from memlm.data.stories.story import Story
from memlm.data.stories.words import Dice
from memlm.errors import UserError
from memlm.evaluation.babilong import world_logic, world_places, world_reasoning

_MAKERS = {
    1: world_places.where_is_person,
    2: world_places.where_is_thing,
    3: world_places.where_thing_was,
    4: world_reasoning.two_arguments,
    5: world_places.who_gave_what,
    6: world_places.is_person_there,
    7: world_places.how_many_things,
    8: world_places.which_things,
    9: world_logic.negation,
    10: world_logic.indefinite_knowledge,
    11: world_logic.coreference,
    12: world_logic.conjunction,
    13: world_logic.compound_coreference,
    14: world_logic.time_reasoning,
    15: world_reasoning.deduction,
    16: world_reasoning.induction,
    17: world_reasoning.positions,
    18: world_reasoning.sizes,
    19: world_reasoning.paths,
    20: world_reasoning.motives,
}


def make_story(number: int, rng: np.random.Generator) -> Story:
    """A new story of a question type; the same state of `rng` gives the same story.

    Args:
        number: of the question type, 1 to 20 as in bAbI.
        rng: drawn from; how many numbers it gives differs between stories.

    Raises:
        UserError: for a number that is no question type.
    """
    if number not in _MAKERS:
        raise UserError(f"babilong: no question type {number}; valid are 1 to {len(_MAKERS)}")
    dice = Dice(rng)
    while (story := _MAKERS[number](dice)) is None:
        pass
    return story
