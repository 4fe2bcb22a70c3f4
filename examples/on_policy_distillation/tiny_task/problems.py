"""The word problems of the tiny task, their correct chains, and the chains of a writer with systematic slips.

    Tom has 18 apples, gives 4 away, loses 6, gets 3 bags of 5. How many?
    18-4=14; 14-6=8; 3*5=15; 8+15=23; # 23

A problem is a start and three events; no running total exceeds 50. The reference answer is the number after ``#``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

NAMES = ("Tom", "Ann", "Bob", "Eve", "Sam", "Lia", "Max", "Zoe")
ITEMS = ("apples", "books", "coins", "cards", "shells", "stamps", "eggs", "pens")
LARGEST_TOTAL = 50
LARGEST_STEP = 30  # of the start, and of what is bought or found at once
EVENTS = 3

Calculator = Callable[[int, str, int], int]  # (left, one of "+-*", right) -> what the writer takes it to be


@dataclass(frozen=True, kw_only=True)
class Event:
    """``bags`` x ``amount`` come in when ``bags`` is given; otherwise ``amount`` comes (+) or goes (-)."""

    operator: str  # "+" or "-"
    amount: int
    bags: int | None = None
    verb: str


@dataclass(frozen=True, kw_only=True)
class Problem:
    name: str
    item: str
    start: int
    events: tuple[Event, ...]

    @property
    def prompt(self) -> str:
        clauses = [f"{self.name} has {self.start} {self.item}", *map(_clause, self.events)]
        return ", ".join(clauses) + ". How many?"

    @property
    def answer(self) -> int:
        total = self.start
        for event in self.events:
            change = event.amount * (event.bags or 1)
            total += change if event.operator == "+" else -change
        return total

    def chain(self, calculate: Calculator | None = None) -> str:
        """The worked solution. Without ``calculate`` it is correct; with it, errors carry on to the end."""
        calculate = calculate or exact
        steps, total = [], self.start
        for event in self.events:
            amount = event.amount
            if event.bags is not None:
                amount = calculate(event.bags, "*", event.amount)
                steps.append(f"{event.bags}*{event.amount}={amount}; ")
            result = max(0, calculate(total, event.operator, amount))
            steps.append(f"{total}{event.operator}{amount}={result}; ")
            total = result
        return "".join(steps) + f"# {total}"


def _clause(event: Event) -> str:
    if event.bags is not None:
        return f"{event.verb} {event.bags} bags of {event.amount}"
    tail = {"buys": " more", "finds": " more", "gives": " away", "loses": ""}[event.verb]
    return f"{event.verb} {event.amount}{tail}"


def make_problem(rng: random.Random) -> Problem:
    """A random problem; draws that leave 0 to 50 are thrown away."""
    while True:
        start = rng.randint(5, LARGEST_STEP)
        total, events = start, []
        while len(events) < EVENTS and (event := _make_event(rng, total)) is not None:
            events.append(event)
            change = event.amount * (event.bags or 1)
            total += change if event.operator == "+" else -change
        if len(events) == EVENTS:
            name, item = rng.choice(NAMES), rng.choice(ITEMS)
            return Problem(name=name, item=item, start=start, events=tuple(events))


def _make_event(rng: random.Random, total: int) -> Event | None:
    """The next event, or None where the drawn kind does not fit ``total``."""
    kind = rng.choice(("add", "subtract", "bags"))
    if kind == "add":
        room = LARGEST_TOTAL - total
        if room < 4:
            return None
        return Event(operator="+", amount=rng.randint(2, min(LARGEST_STEP, room)), verb=rng.choice(("buys", "finds")))
    if kind == "subtract":
        if total < 4:
            return None
        return Event(operator="-", amount=rng.randint(2, total - 1), verb=rng.choice(("gives", "loses")))
    bags, amount = rng.randint(2, 9), rng.randint(2, 12)
    if total + bags * amount > LARGEST_TOTAL:
        return None
    return Event(operator="+", amount=amount, bags=bags, verb="gets")


def exact(left: int, operator: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


@dataclass(frozen=True, kw_only=True)
class SloppyCalculator:
    """Forgets carries and borrows, and takes the neighbouring entry of the times table.

    The slips are systematic, so about two problems in three end wrong although most single steps are right: the task
    reward is sparse while a teacher's opinion of each token is not.
    """

    rng: random.Random
    carry: float = 0.93  # share of additions with a carry that lose it
    borrow: float = 0.93
    large_product: float = 0.80  # of products with a left factor of 5 or more
    other: float = 0.02  # off by one elsewhere

    def __call__(self, left: int, operator: str, right: int) -> int:
        result = exact(left, operator, right)
        u = self.rng.random()
        if operator == "+" and left % 10 + right % 10 >= 10:
            return result - 10 if u < self.carry else result
        if operator == "-" and left % 10 < right % 10:
            return result + 10 if u < self.borrow else result
        if operator == "*" and left >= 5:
            return result + self.rng.choice((-right, right)) if u < self.large_product else result
        return max(0, result + self.rng.choice((-1, 1))) if u < self.other else result


def distinct_problems(count: int, *, seed: int, exclude: frozenset[str] = frozenset()) -> list[Problem]:
    """``count`` problems with different prompts, none of them in ``exclude``."""
    rng, seen, problems = random.Random(seed), set(exclude), []
    while len(problems) < count:
        problem = make_problem(rng)
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            problems.append(problem)
    return problems
