"""Stories that a conclusion is drawn from: bAbI's question types 4 and 15 to 20.

Directions between rooms, rules about kinds of animals, positions, sizes, paths and motives.
"""

from memlm.data.stories.story import Story
from memlm.data.stories.words import (
    OPPOSITES,
    PLACES,
    STEPS,
    TAKES,
    Dice,
    move_sentence,
    relation_sentence,
)

_PLURALS = {"cat": "cats", "mouse": "mice", "sheep": "sheep", "wolf": "wolves"}
_FEARFUL = ("Emily", "Gertrude", "Jessica", "Winona")
_ANIMALS = ("Bernhard", "Brian", "Greg", "Julius", "Lily")
_KINDS = ("frog", "lion", "rhino", "swan")
_COLORS = ("gray", "green", "white", "yellow")
_SHAPES = (
    "blue square",
    "pink rectangle",
    "red sphere",
    "red square",
    "triangle",
    "yellow square",
)
_RELATIONS = {
    "north": "above",
    "south": "below",
    "east": "to the right of",
    "west": "to the left of",
}
_SWEETS = ("chocolate", "box of chocolates")  # smaller than any container, the first the smallest
_CONTAINERS = ("box", "chest", "container", "suitcase")
_MOTIVES = {  # where it leads and what is fetched there
    "bored": ("garden", "football"),
    "hungry": ("kitchen", "apple"),
    "thirsty": ("kitchen", "milk"),
    "tired": ("bedroom", "pajamas"),
}
_WANTING = ("Antoine", "Jason", "Sumit", "Yann")


def two_arguments(dice: Dice) -> Story:
    """Type 4: three rooms in a row; which one lies on a side of the middle one.

    Of an end, "what is north of it" would fit both other rooms.
    """
    direction = dice.pick(list(OPPOSITES))
    first, middle, last = dice.shuffled(PLACES)[:3]
    asked = relation_sentence(dice, first, direction, middle)
    other = relation_sentence(dice, last, OPPOSITES[direction], middle)
    facts = dice.shuffled([asked, other])
    if dice.chance(0.5):
        question = f"What is {direction} of the {middle}?"
    else:
        question = f"What is the {middle} {OPPOSITES[direction]} of?"
    return Story(facts, question, first, [facts.index(asked)])


def deduction(dice: Dice) -> Story:
    """Type 15: what an animal is afraid of, from its kind and a rule about the kind."""
    fears = {kind: dice.pick_other(list(_PLURALS), kind) for kind in _PLURALS}
    kinds = {name: dice.pick(list(_PLURALS)) for name in _FEARFUL}
    rules = {
        kind: f"{_PLURALS[kind].capitalize()} are afraid of {_PLURALS[feared]}."
        for kind, feared in fears.items()
    }
    members = {name: f"{name} is a {kind}." for name, kind in kinds.items()}
    facts = dice.shuffled([*rules.values(), *members.values()])
    name = dice.pick(_FEARFUL)
    supporting = sorted([facts.index(members[name]), facts.index(rules[kinds[name]])])
    question = f"What is {name.lower()} afraid of?"
    return Story(facts, question, fears[kinds[name]], supporting)


def induction(dice: Dice) -> Story:
    """Type 16: the color of an animal, from the color of others of its kind.

    All animals of a kind have the same color; two kinds may share one.
    """
    colors = {kind: dice.pick(_COLORS) for kind in _KINDS}
    kinds = {name: dice.pick(_KINDS) for name in _ANIMALS}
    # Five animals and four kinds: at least two are alike.
    alike = [name for name in _ANIMALS if list(kinds.values()).count(kinds[name]) > 1]
    asked = dice.pick(alike)
    example = dice.pick([name for name in alike if name != asked and kinds[name] == kinds[asked]])
    members = {name: f"{name} is a {kind}." for name, kind in kinds.items()}
    colored = {name: f"{name} is {colors[kinds[name]]}." for name in _ANIMALS if name != asked}
    facts = dice.shuffled([*members.values(), *colored.values()])
    support = (members[asked], members[example], colored[example])
    supporting = sorted(facts.index(fact) for fact in support)
    return Story(facts, f"What color is {asked}?", colors[kinds[asked]], supporting)


def positions(dice: Dice) -> Story:
    """Type 17: how two shapes lie to each other that each lie next to a third one.

    As in bAbI, shapes lie on a grid: what is above something has the same column. Only directions
    in which the two differ are asked about.
    """
    first, middle, last = dice.shuffled(_SHAPES)[:3]
    to_first = dice.pick(list(STEPS))
    to_last = dice.pick_other(list(STEPS), to_first)
    facts = dice.shuffled(
        [_position(dice, first, to_first, middle), _position(dice, last, to_last, middle)]
    )
    # From `last` to the middle and on to `first`.
    path = (OPPOSITES[to_last], to_first)
    direction = dice.pick(path)
    yes = dice.chance(0.5)
    asked = direction if yes else OPPOSITES[direction]
    if dice.chance(0.5):
        first, last, asked = last, first, OPPOSITES[asked]
    question = f"Is the {first} {_RELATIONS[asked]} the {last}?"
    return Story(facts, question, "yes" if yes else "no", [0, 1])


def sizes(dice: Dice) -> Story | None:
    """Type 18: which of two things is bigger, from their sizes against a third one.

    The pair asked about is in no fact together.
    """
    things = [*_SWEETS, *dice.shuffled(_CONTAINERS)]  # by size
    pairs = [(small, big) for big in range(len(things)) for small in range(big)]
    told = dice.shuffled(pairs)[: 10 if dice.chance(0.15) else 5]
    facts = [
        f"The {things[small]} fits inside the {things[big]}."
        if dice.chance(0.5)
        else f"The {things[big]} is bigger than the {things[small]}."
        for small, big in told
    ]
    steps = [
        (lower, upper)
        for lower in told
        for upper in told
        if lower[1] == upper[0] and (lower[0], upper[1]) not in told
    ]
    if not steps:
        return None
    lower, upper = dice.pick(steps)
    small, big = things[lower[0]], things[upper[1]]
    yes = dice.chance(0.5)
    if dice.chance(0.5):
        question = f"Is the {big if yes else small} bigger than the {small if yes else big}?"
    else:
        question = f"Does the {small if yes else big} fit in the {big if yes else small}?"
    supporting = sorted([told.index(lower), told.index(upper)])
    return Story(facts, question, "yes" if yes else "no", supporting)


def paths(dice: Dice) -> Story | None:
    """Type 19: two steps from one room to another over the room between them.

    Rooms lie on a grid and hang together as a tree, so that the facts hold one way only. Stories
    where a second way exists that no fact tells, around a corner, are left out.
    """
    rooms = dice.shuffled(PLACES)
    cells = {rooms[0]: (0, 0)}
    doors: list[tuple[str, str, str]] = []  # from a room, in a direction, to a room
    while len(cells) < len(rooms):
        start, direction = dice.pick(list(cells)), dice.pick(list(STEPS))
        cell = _beside(cells[start], direction)
        if cell not in cells.values():
            doors.append((start, direction, rooms[len(cells)]))
            cells[rooms[len(cells)]] = cell
    doors = dice.shuffled(doors)
    facts = [relation_sentence(dice, end, direction, start) for start, direction, end in doors]
    steps = [
        (start, direction, end, number)
        for number, door in enumerate(doors)
        for start, direction, end in (door, (door[2], OPPOSITES[door[1]], door[0]))
    ]
    ways = [
        (one, two)
        for one in steps
        for two in steps
        if one[2] == two[0]
        and one[3] != two[3]
        and (one[1] == two[1] or _beside(cells[one[0]], two[1]) not in cells.values())
    ]
    if not ways:
        return None
    one, two = dice.pick(ways)
    question = f"How do you go from the {one[0]} to the {two[2]}?"
    return Story(facts, question, f"{one[1][0]},{two[1][0]}", sorted([one[3], two[3]]))


def motives(dice: Dice) -> Story:
    """Type 20: where somebody will go, or why they went or took something."""
    wants = {name: dice.pick(list(_MOTIVES)) for name in _WANTING}
    # Everybody is in a state, goes and takes, in this order and among the others.
    order = dice.shuffled([name for name in _WANTING for _ in range(3)])
    order = order[: dice.pick(range(1, len(order) + 1))]
    facts: list[str] = []
    said: dict[str, int] = {}
    for fact, name in enumerate(order):
        place, thing = _MOTIVES[wants[name]]
        done = order[:fact].count(name)
        if done == 0:
            facts.append(f"{name} is {wants[name]}.")
            said[name] = fact
        elif done == 1:
            facts.append(move_sentence(dice, name, place))
        else:
            facts.append(f"{name} {dice.pick(TAKES)} the {thing} there.")
    asked = dice.pick(list(said))
    place, thing = _MOTIVES[wants[asked]]
    who, done = asked.lower(), order.count(asked)
    if done == 1:
        return Story(facts, f"Where will {who} go?", place, [said[asked]])
    if done == 2 or dice.chance(0.5):
        question = f"Why did {who} go to the {place}?"
    else:
        question = f"Why did {who} get the {thing}?"
    return Story(facts, question, wants[asked], [said[asked]])


def _position(dice: Dice, shape: str, direction: str, other: str) -> str:
    """That `shape` lies in `direction` of `other`, said from either of the two."""
    if dice.chance(0.5):
        return f"The {shape} is {_RELATIONS[direction]} the {other}."
    return f"The {other} is {_RELATIONS[OPPOSITES[direction]]} the {shape}."


def _beside(cell: tuple[int, int], direction: str) -> tuple[int, int]:
    """The next cell of the grid in a direction."""
    right, up = STEPS[direction]
    return (cell[0] + right, cell[1] + up)
