"""Stories about people who walk and carry things: bAbI's question types 1, 2, 3, 5, 6, 7 and 8.

A house keeps the true state of its small world, from places at the start that no sentence tells,
so that nobody takes or hands over what is elsewhere. Next to it stands what a reader of the facts
knows, and from which facts; only that is asked about. A maker returns None when the story drawn
has no question with one clear answer, and is then called again.
"""

from dataclasses import dataclass, field

from memlm.evaluation.babilong.stories import Story
from memlm.evaluation.babilong.world_words import (
    DROPS,
    GIVERS,
    GIVES,
    PEOPLE,
    PLACES,
    TAKES,
    THINGS,
    Dice,
    move_sentence,
)

_COUNTS = ("none", "one", "two", "three")


@dataclass(frozen=True)
class _Carried:
    """A thing that came from one known place to the next, and the three facts that say so."""

    thing: str
    before: str
    after: str
    supporting: list[int]


@dataclass(frozen=True)
class _Gift:
    """Who gave what to whom; the place of the fact in the story."""

    giver: str
    thing: str
    receiver: str
    fact: int


@dataclass(frozen=True)
class _Habits:
    """What happens how often in a house, as shares of the facts; the rest are moves."""

    take: float = 0.0
    drop: float = 0.0
    give: float = 0.0
    take_there: float = 1.0  # how often a take ends with "there"
    drop_there: float = 0.2


@dataclass
class _House:
    """The world of one story; `step` adds one event and its sentence."""

    dice: Dice
    people: tuple[str, ...]
    habits: _Habits
    facts: list[str] = field(default_factory=list)
    # The true state.
    place: dict[str, str] = field(default_factory=dict)  # of every person
    lying: dict[str, str | None] = field(default_factory=dict)  # None: never touched, anywhere
    held: dict[str, list[str]] = field(default_factory=dict)  # by person, in the order of taking
    # What a reader knows: numbers are facts.
    moved: dict[str, int] = field(default_factory=dict)  # the last move of a person
    taken: dict[str, int] = field(default_factory=dict)  # the last take of a thing
    left: dict[str, list[int]] = field(default_factory=dict)  # where a lying thing is, and why
    handled: dict[str, list[int]] = field(default_factory=dict)  # takes, drops, gifts of a person
    visits: dict[str, list[str]] = field(default_factory=dict)  # known places of a thing
    carried: list[_Carried] = field(default_factory=list)
    gifts: list[_Gift] = field(default_factory=list)

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
                self.carried.append(_Carried(thing, self.place[who], place, because))
            self.visits[thing].append(place)
        self.place[who] = place
        self.moved[who] = fact
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
        if who in self.moved and self.visits[thing][-1:] != [self.place[who]]:
            self.visits[thing].append(self.place[who])
        there = " there" if self.dice.chance(self.habits.take_there) else ""
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
        fact = self._handle(who)
        self._handle(other)
        self.gifts.append(_Gift(who, thing, other, fact))
        self.facts.append(f"{who} {self.dice.pick(GIVES)} the {thing} to {other}.")
        return True

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


def where_is_person(dice: Dice) -> Story:
    """Type 1: the last place somebody went to."""
    house = _House(dice, PEOPLE, _Habits())
    house.live(dice.pick(range(2, 12, 2)))
    who = dice.pick(list(house.moved))
    return Story(house.facts, f"Where is {who}?", house.place[who], [house.moved[who]])


def where_is_thing(dice: Dice) -> Story | None:
    """Type 2: where a thing is that somebody carries or has left."""
    house = _House(dice, PEOPLE, _Habits(take=0.22, drop=0.15))
    house.live(dice.pick(range(2, 28, 2)))
    known = house.where_things_are()
    if not known:
        return None
    thing = dice.pick(list(known))
    place, supporting = known[thing]
    return Story(house.facts, f"Where is the {thing}?", place, supporting)


def where_thing_was(dice: Dice) -> Story | None:
    """Type 3: where a thing came from when it was brought to a place.

    Only places that the thing was at once are asked about, the place where it is now if it can be.
    """
    house = _House(dice, PEOPLE, _Habits(take=0.25, drop=0.18, take_there=0.2))
    house.live(dice.pick(range(6, 82, 2)))
    once = [
        carried
        for carried in house.carried
        if house.visits[carried.thing].count(carried.after) == 1
    ]
    now = [carried for carried in once if house.visits[carried.thing][-1] == carried.after]
    if not once:
        return None
    asked = dice.pick(now or once)
    question = f"Where was the {asked.thing} before the {asked.after}?"
    return Story(house.facts, question, asked.before, asked.supporting)


def who_gave_what(dice: Dice) -> Story | None:
    """Type 5: giver, thing or receiver of a gift; all gifts that fit the question agree."""
    house = _House(dice, GIVERS, _Habits(take=0.2, drop=0.11, give=0.28))
    house.live(dice.pick(range(2, 36, 2)))
    # The words of a question, what it asks for, and what it tells of the gift.
    forms = dice.shuffled(
        [
            ("What did {giver} give to {receiver}?", "thing", ("giver", "receiver")),
            ("What did {giver} give to {receiver}?", "thing", ("giver", "receiver")),
            ("Who gave the {thing} to {receiver}?", "giver", ("thing", "receiver")),
            ("Who did {giver} give the {thing} to?", "receiver", ("giver", "thing")),
            ("Who gave the {thing}?", "giver", ("thing",)),
            ("Who received the {thing}?", "receiver", ("thing",)),
        ]
    )
    for words, wanted, told in forms:
        for gift in reversed(house.gifts):
            fits = [
                other
                for other in house.gifts
                if all(getattr(other, key) == getattr(gift, key) for key in told)
            ]
            if len({getattr(other, wanted) for other in fits}) == 1:
                question = words.format_map(vars(gift))
                return Story(house.facts, question, getattr(gift, wanted), [gift.fact])
    return None


def is_person_there(dice: Dice) -> Story | None:
    """Type 6: whether somebody is at a place, yes as often as no."""
    house = _House(dice, PEOPLE, _Habits(take=0.25, drop=0.1))
    house.live(dice.pick(range(2, 12, 2)))
    if not house.moved:
        return None
    who = dice.pick(list(house.moved))
    yes = dice.chance(0.5)
    place = house.place[who] if yes else dice.pick_other(PLACES, house.place[who])
    question = f"Is {who} in the {place}?"
    return Story(house.facts, question, "yes" if yes else "no", [house.moved[who]])


def how_many_things(dice: Dice) -> Story | None:
    """Type 7: how many things somebody carries who had at least one."""
    house = _House(dice, PEOPLE, _Habits(take=0.26, drop=0.13, give=0.2))
    house.live(dice.pick(range(2, 16, 2)))
    who = _pick_holder(house)
    if who is None:
        return None
    question = f"How many objects is {who} carrying?"
    return Story(house.facts, question, _COUNTS[len(house.held[who])], house.handled[who])


def which_things(dice: Dice) -> Story | None:
    """Type 8: the things that somebody carries, in the order in which they were taken."""
    house = _House(dice, PEOPLE, _Habits(take=0.26, drop=0.12))
    house.live(dice.pick(range(2, 18, 2)))
    who = _pick_holder(house)
    if who is None:
        return None
    answer = ",".join(house.held[who]) or "nothing"
    return Story(house.facts, f"What is {who} carrying?", answer, house.handled[who])


def _pick_holder(house: _House) -> str | None:
    """Somebody who held something, every number of things now held as likely as the others."""
    if not house.handled:
        return None
    amount = house.dice.pick(sorted({len(house.held[who]) for who in house.handled}))
    return house.dice.pick([who for who in house.handled if len(house.held[who]) == amount])
