"""What follows from the events of a story, for somebody who reads them in order."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple


class Event(NamedTuple):
    """One fact.

    Attributes:
        kind: "move", "take", "drop" or "give".
        who: who does it.
        what: the place of a move; otherwise the thing.
        receiver: of a gift.
    """

    kind: str
    who: str
    what: str
    receiver: str = ""


class Reader:
    """Places of people and things after events, as far as they can be known.

    Two people who hand over a thing are at one place, and so are a thing and whoever takes it. From
    the place of either follows that of the other, also when it is told later.
    """

    def __init__(self, events: Iterable[Event]):
        # Stays: somebody's time at one place. Those that are known to be at one place point to one
        # of them, in the end to one that points to itself; it alone has the place, if it is known.
        self._same: list[int] = []
        self._place: list[str | None] = []
        self._stay: dict[str, int] = {}  # of people, and of things that lie
        self._holder: dict[str, str] = {}
        self._visits: dict[str, list[int]] = defaultdict(list)
        for event in events:
            self._read(event)

    def where(self, name: str) -> str | None:
        """The place of a person or a thing; None = not known."""
        holder = self._holder.get(name, name)
        return self._known(self._stay[holder]) if holder in self._stay else None

    def visits(self, thing: str) -> list[str | None]:
        """Places of a thing in order, without repetitions; None = not known."""
        places = map(self._known, self._visits[thing])
        return [place for place, _ in groupby(places)]

    def before(self, thing: str, place: str) -> str | None:
        """Where a thing was before it came to a place for the last time; None = not known."""
        visits = self.visits(thing)
        known = [number for number, found in enumerate(visits) if found == place]
        return visits[known[-1] - 1] if known and known[-1] > 0 else None

    def _read(self, event: Event) -> None:
        if event.kind == "move":
            self._stay[event.who] = self._begin(event.what)
            for thing, holder in self._holder.items():
                if holder == event.who:
                    self._visits[thing].append(self._stay[holder])
            return
        stay, thing = self._stay_of(event.who), event.what
        if event.kind == "drop":
            self._holder.pop(thing, None)
            self._stay[thing] = stay
        elif event.kind == "take":
            if thing not in self._holder:
                self._join(stay, self._stay_of(thing))
            self._holder[thing] = event.who
        else:
            self._join(stay, self._stay_of(event.receiver))
            self._holder[thing] = event.receiver
        self._visits[thing].append(stay)

    def _begin(self, place: str | None) -> int:
        self._same.append(len(self._same))
        self._place.append(place)
        return len(self._place) - 1

    def _stay_of(self, name: str) -> int:
        if name not in self._stay:
            self._stay[name] = self._begin(None)
        return self._stay[name]

    def _root(self, stay: int) -> int:
        while self._same[stay] != stay:
            stay = self._same[stay]
        return stay

    def _known(self, stay: int) -> str | None:
        return self._place[self._root(stay)]

    def _join(self, first: int, second: int) -> None:
        first, second = self._root(first), self._root(second)
        self._same[second] = first
        self._place[first] = self._place[first] or self._place[second]
