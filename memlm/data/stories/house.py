"""A house of people who walk and carry things, told in sentences in the manner of bAbI.

The words and sentence forms are those of bAbI's question types 1 to 8 (Weston et al., "Towards
AI-Complete Question Answering", 2015, arXiv:1502.05698).
"""

from dataclasses import dataclass, field

from memlm.data.stories.reader import Event
from memlm.data.stories.words import (
    DROPS,
    GIVES,
    PLACES,
    TAKES,
    THINGS,
    Dice,
    move_sentence,
)


@dataclass(frozen=True)
class Carried:
    """A thing that came from one known place to the next, and the three facts that say so."""

    thing: str
    before: str
    after: str
    supporting: list[int]


@dataclass(frozen=True)
class Gift:
    """Who gave what to whom; the place of the fact in the story."""

    giver: str
    thing: str
    receiver: str
    fact: int


@dataclass(frozen=True)
class Habits:
    """What happens how often in a house, as shares of the facts; the rest are moves."""

    take: float = 0.0
    drop: float = 0.0
    give: float = 0.0
    take_there: float = 1.0  # how often a take ends with "there"
    drop_there: float = 0.2


@dataclass
class House:
    """The world of one story; `step` adds one event and its sentence.

    It keeps its true state, from places at the start that no sentence tells, so that nobody takes
    or hands over what is elsewhere. Next to it stands what a reader of the facts knows, and from
    which facts.
    """

    dice: Dice
    people: tuple[str, ...]
    habits: Habits
    facts: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)  # what the facts say
    # The true state.
    place: dict[str, str] = field(default_factory=dict)  # of every person
    lying: dict[str, str | None] = field(default_factory=dict)  # None: never touched, anywhere
    held: dict[str, list[str]] = field(default_factory=dict)  # by person, in the order of taking
    # What a reader knows: numbers are facts.
    moved: dict[str, int] = field(default_factory=dict)  # the last move of a person
    taken: dict[str, int] = field(default_factory=dict)  # the last take or gift of a thing
    left: dict[str, list[int]] = field(default_factory=dict)  # where a lying thing is, and why
    handled: dict[str, list[int]] = field(default_factory=dict)  # takes, drops, gifts of a person
    visits: dict[str, list[str]] = field(default_factory=dict)  # known places of a thing
    carried: list[Carried] = field(default_factory=list)
    gifts: list[Gift] = field(default_factory=list)

    def __post_init__(self):
        self.place = {person: self.dice.pick(PLACES) for person in self.people}
        self.held = {person: [] for person in self.people}
        self.lying = dict.fromkeys(THINGS)
        self.visits = {thing: [] for thing in THINGS}

    def live(self, events: int) -> None:
        """Let `events` things happen, one fact each."""
        for _ in range(events):
            self.step()

    def step(self) -> None:
        """One event: what the draw asks for where the world allows it, else a move."""
        draw, habits = self.dice.number(), self.habits
        if draw < habits.take:
            done = self._take()
        elif draw < habits.take + habits.drop:
            done = self._drop()
        elif draw < habits.take + habits.drop + habits.give:
            done = self._give()
        else:
            done = False
        if not done:
            self._move()

    def _move(self) -> None:
        who = self.dice.pick(self.people)
        place = self.dice.pick_other(PLACES, self.place[who])
        fact = len(self.facts)
        for thing in self.held[who]:
            if who in self.moved:
                because = sorted({self.moved[who], self.taken[thing], fact})
                self.carried.append(Carried(thing, self.place[who], place, because))
            self.visits[thing].append(place)
        self.place[who] = place
        self.moved[who] = fact
        self.events.append(Event("move", who, place))
        self.facts.append(move_sentence(self.dice, who, place))

    def _take(self) -> bool:
        possible = [
            (person, thing)
            for thing, place in self.lying.items()
            for person in self.people
            if place is None or place == self.place[person]
        ]
        if not possible:
            return False
        who, thing = self.dice.pick(possible)
        self.lying.pop(thing)
        self.left.pop(thing, None)
        self.held[who].append(thing)
        self.taken[thing] = self._handle(who)
        self._note_visit(who, thing)
        there = " there" if self.dice.chance(self.habits.take_there) else ""
        self.events.append(Event("take", who, thing))
        self.facts.append(f"{who} {self.dice.pick(TAKES)} the {thing}{there}.")
        return True

    def _drop(self) -> bool:
        possible = [(person, thing) for person in self.people for thing in self.held[person]]
        if not possible:
            return False
        who, thing = self.dice.pick(possible)
        self.held[who].remove(thing)
        self.lying[thing] = self.place[who]
        fact = self._handle(who)
        if who in self.moved:
            self.left[thing] = sorted({self.moved[who], fact})
        there = " there" if self.dice.chance(self.habits.drop_there) else ""
        self.events.append(Event("drop", who, thing))
        self.facts.append(f"{who} {self.dice.pick(DROPS)} the {thing}{there}.")
        return True

    def _give(self) -> bool:
        possible = [
            (person, thing, other)
            for person in self.people
            for thing in self.held[person]
            for other in self.people
            if other != person and self.place[other] == self.place[person]
        ]
        if not possible:
            return False
        who, thing, other = self.dice.pick(possible)
        self.held[who].remove(thing)
        self.held[other].append(thing)
        fact = self.taken[thing] = self._handle(who)
        self._handle(other)
        self._note_visit(other, thing)
        self.events.append(Event("give", who, thing, other))
        self.gifts.append(Gift(who, thing, other, fact))
        self.facts.append(f"{who} {self.dice.pick(GIVES)} the {thing} to {other}.")
        return True

    def _note_visit(self, who: str, thing: str) -> None:
        """Note where a thing is that `who` has got, if it is known and new."""
        if who in self.moved and self.visits[thing][-1:] != [self.place[who]]:
            self.visits[thing].append(self.place[who])

    def _handle(self, who: str) -> int:
        """Note that the next fact changes what `who` holds; its number."""
        self.handled.setdefault(who, []).append(len(self.facts))
        return len(self.facts)

    def where_things_are(self) -> dict[str, tuple[str, list[int]]]:
        """Things whose place follows from two facts: the place and the facts."""
        known = {
            thing: (self.place[person], sorted({self.moved[person], self.taken[thing]}))
            for person in self.moved
            for thing in self.held[person]
        }
        known.update({thing: (self.lying[thing], why) for thing, why in self.left.items()})
        return known
