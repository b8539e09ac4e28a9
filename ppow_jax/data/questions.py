"""Questions that come with the project: arithmetic word problems from templates, and chats in two turns.

They need no network and no package, and are under the project's own licence. They resemble the kinds of questions of
GSM8K and MT-Bench, but are not those: results on them cannot be compared with results on these benchmarks.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

ARITHMETIC_COUNT = 160

_NAMES = ("Amira", "Bruno", "Chen", "Dalia", "Emil", "Farah", "Goran", "Hana", "Ivo", "Jonna", "Kofi", "Lucia")
_THINGS = ("apples", "books", "candles", "eggs", "marbles", "notebooks", "pencils", "plates", "stamps", "tickets")
_PLACES = ("a bakery", "a farm", "a library", "a market stall", "a school", "a small workshop")


def _two(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(_NAMES, 2)
    return a, b


def _shopping(rng: random.Random) -> str:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    count, price, paid = rng.randint(3, 12), rng.randint(2, 9), rng.choice((100, 120, 150, 200))
    return (
        f"{name} buys {count} boxes of {thing} for {price} dollars each and pays with {paid} dollars. "
        "How much change comes back?"
    )


def _sharing(rng: random.Random) -> str:
    (a, b), thing = _two(rng), rng.choice(_THINGS)
    start, given, had = rng.randint(40, 90), rng.randint(5, 30), rng.randint(3, 25)
    return (
        f"{a} has {start} {thing}, {b} has {had}. {a} gives {given} of them to {b}. "
        "What is the difference between their numbers now?"
    )


def _work(rng: random.Random) -> str:
    name, days, hours, wage = rng.choice(_NAMES), rng.randint(3, 6), rng.randint(4, 8), rng.randint(11, 25)
    bonus = rng.randint(2, 9) * 10
    return (
        f"{name} works {hours} hours a day on {days} days a week and earns {wage} dollars an hour. Every fourth week "
        f"there is a bonus of {bonus} dollars. How much does {name} earn in {4 * rng.randint(1, 3)} weeks?"
    )


def _journey(rng: random.Random) -> str:
    name, speed, hours, slower = rng.choice(_NAMES), rng.randint(4, 9) * 10, rng.randint(2, 5), rng.randint(1, 3) * 10
    return (
        f"{name} drives {hours} hours at {speed} kilometres an hour, rests for half an hour, and drives "
        f"{hours + 1} hours more at a speed that is {slower} kilometres an hour lower. How long is the whole way?"
    )


def _rows(rng: random.Random) -> str:
    place, thing, rows = rng.choice(_PLACES), rng.choice(_THINGS), rng.randint(6, 15)
    each, broken = rng.randint(8, 24), rng.randint(3, 20)
    return (
        f"In {place} there are {rows} shelves with {each} {thing} on each. {broken} are damaged and are thrown away, "
        f"and a third of the remaining {thing} are sold. How many were sold, if the number is rounded down?"
    )


def _ages(rng: random.Random) -> str:
    (a, b), older, years = _two(rng), rng.randint(3, 20), rng.randint(4, 12)
    young = rng.randint(6, 15)
    return (
        f"{a} is {older} years older than {b}, who will be {young + years} in {years} years. "
        "What is the sum of their ages today?"
    )


def _percent(rng: random.Random) -> str:
    name, price, off = rng.choice(_NAMES), rng.randint(4, 30) * 20, rng.choice((5, 10, 15, 20, 25, 40))
    return (
        f"A coat costs {price} dollars. In a sale it is {off} percent cheaper, and {name} has a coupon for another "
        f"{rng.randint(1, 3) * 5} dollars off the lower price. What does {name} pay?"
    )


def _tank(rng: random.Random) -> str:
    full, inflow, leak = rng.randint(4, 12) * 60, rng.randint(8, 15), rng.randint(2, 5)
    return (
        f"A tank holds {full} litres. Every minute {inflow} litres flow in and {leak} litres leak out. "
        "After how many minutes is the empty tank full? Round up to whole minutes."
    )


_PROBLEMS: tuple[Callable[[random.Random], str], ...] = (
    _shopping, _sharing, _work, _journey, _rows, _ages, _percent, _tank,
)  # fmt: skip

_CHATS = (
    ("Explain to a ten-year-old why the sea is salty.", "Now say it in a single sentence."),
    ("Write a short poem about a bicycle in the rain.", "Change it so that the bicycle is the one who speaks."),
    ("Plan three days in a city that you choose, without a car.", "What would you leave out if it rained all day?"),
    ("What are the advantages of a library over a bookshop?", "Which of them matters most for a small village?"),
    ("Write a polite email that asks a landlord to repair a heater.", "Make it firmer, but still polite."),
    ("How does a vaccine work?", "Why are some of them given twice?"),
    ("Describe the taste of coffee to someone who never had any.", "And how does tea differ from it?"),
    ("Give me a recipe for a soup with lentils.", "Adapt it for a person who eats no garlic and no onions."),
    ("What is the difference between weather and climate?", "Give one example of a mistake that mixes them up."),
    ("Write the opening paragraph of a mystery set in a lighthouse.", "Write the last paragraph of the same story."),
    ("How can I learn to juggle with three balls?", "I keep throwing the balls forward. What should I do?"),
    ("Summarise the idea of supply and demand in five sentences.", "Show it with the price of umbrellas."),
    ("What should a beginner know before keeping bees?", "How much time does it take in winter?"),
    ("Compare a violin with a cello.", "Which of the two is easier for an adult who begins?"),
    ("Explain what a hash table is.", "What happens when two keys have the same hash?"),
    ("Write a Python function that checks whether a word is a palindrome.", "Let it ignore blanks and capitals."),
    ("What is a proof by contradiction?", "Prove in this way that the square root of 2 is irrational."),
    ("I have an exam in a week and have not begun. Make a plan.", "I can study only two hours a day. Change it."),
    ("Why do leaves turn red in autumn?", "Do all trees do that for the same reason?"),
    ("Invent a game for six people that needs only a coin.", "Make it possible to lose on purpose and still win."),
    ("What is inflation, and who is hurt by it most?", "How does a central bank fight it?"),
    ("Write a product description of a very ordinary spoon.", "Now write a bad review of it by a customer."),
    ("How do ships find their way without satellites?", "Which of these ways works under thick clouds?"),
    ("Give five tips for sleeping better.", "Which of them has the best evidence?"),
    ("Write a dialogue between the moon and a street lamp.", "Continue it at sunrise."),
    ("What is the difference between a virus and a bacterium?", "Which of them do antibiotics act on, and why?"),
    ("How would you explain the rules of chess in two minutes?", "What should a beginner do in the first moves?"),
    ("List what to pack for a week in the mountains.", "The rucksack is too heavy. What goes first?"),
    ("Explain how a refrigerator makes things cold.", "Can one cool a kitchen by leaving its door open?"),
    ("Write a speech of one minute for a friend's wedding.", "Make it funnier, without embarrassing anybody."),
    ("What makes a good question in an interview?", "Give me three such questions for a gardener."),
    ("Who benefits from open source software?", "Argue for the opposite side in the same length."),
    ("What is a black hole?", "What would I see if I fell towards one?"),
    ("Write a limerick about a cat who hates Mondays.", "Translate it into plain prose."),
    ("How do I remove red wine from a white shirt?", "It is already dry. Does that change anything?"),
    ("What is the greenhouse effect?", "Why is the same effect useful for tomatoes?"),
    ("Describe a house in which a clockmaker lives.", "Describe the same house a hundred years later."),
    ("What are prime numbers good for?", "How could one find all of them below 100 by hand?"),
    ("I want to start running. How should I begin?", "My knees hurt after ten minutes. What now?"),
    ("Explain the difference between a tax and a fee.", "To which of them does a parking ticket belong?"),
)


def arithmetic(count: int = ARITHMETIC_COUNT) -> Iterator[tuple[str, Any]]:
    """Yields (place, record) of different word problems; the first ones are the same for every count."""
    rng, seen = random.Random("arithmetic"), set[str]()
    while len(seen) < count:
        problem = _PROBLEMS[len(seen) % len(_PROBLEMS)](rng)
        if problem not in seen:
            yield f"arithmetic[{len(seen)}]", {"prompt": problem}
            seen.add(problem)


def chats() -> Iterator[tuple[str, Any]]:
    """Yields (place, record) of chats of two questions each, without answers."""
    for n, turns in enumerate(_CHATS):
        yield f"chat[{n}]", {"turns": list(turns)}
