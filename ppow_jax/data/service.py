"""Traffic of a service desk: one instruction in all requests, and another customer's message from templates in each.

What an application sends to a model is often such a fixed instruction with changing content. The sources need no
network and no package.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

COUNT = 2000  # prompts of each source

_NAMES = (
    "Amira Haddad", "Bruno Keller", "Chen Li", "Dalia Cohen", "Emil Novak", "Farah Aziz", "Goran Petrov", "Hana Sato",
    "Ivo Marin", "Jonna Berg", "Kofi Mensah", "Lucia Romero", "Marta Silva", "Noah Fischer", "Olga Ivanova",
    "Pablo Diaz", "Rosa Conti", "Samir Khan", "Tessa Brown", "Viktor Lind",
)  # fmt: skip
_PRODUCTS = (
    "coffee grinder", "electric kettle", "cast-iron pan", "bread maker", "hand blender", "kitchen scale", "rice cooker",
    "toaster", "wine cooler", "stand mixer", "pasta machine", "knife set", "juicer", "waffle iron", "slow cooker",
    "milk frother",
)  # fmt: skip
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_GREETINGS = (
    "Hello, my name is {name}.",
    "Hi, {name} here.",
    "Good morning, I am {name}.",
    "Dear team,",
    "To whom it may concern,",
    "Hello,",
)
_CASES = (
    "I bought a {product} from you on {date} (order {order}) and it {problem}.",
    "The {product} of my order {order}, placed on {date}, {problem}.",
    "On {date} I ordered a {product}, order number {order}. It {problem}.",
    "My {product} {problem}. The order number is {order} and the date {date}.",
)
_PROBLEMS = (
    "arrived with a broken lid",
    "does not switch on",
    "makes a loud noise and smells of burning",
    "was delivered in the wrong colour",
    "stopped working after two weeks",
    "has a scratch on the front",
    "came without the manual and the cable",
    "leaks water at the bottom",
    "is still not here after ten days",
    "gets so hot that I cannot touch it",
    "was left in the rain in front of my door",
    "does not fit the plug in my house",
)
_DETAILS = (
    "I have been a customer for years and never had this.",
    "It was a present for my mother.",
    "I paid {price} dollars for it.",
    "I already wrote to you last week and got no answer.",
    "I use it every day in a small cafe.",
    "The box looked fine from outside.",
)
_WISHES = (
    "I would like my money back.",
    "Please send me a new one.",
    "Can it be repaired?",
    "What should I do now?",
    "I need it before the weekend.",
    "Please tell me where to send it.",
    "I want to talk to somebody about it.",
    "Is this covered by the warranty?",
)

_TICKETS = """\
Write an XML record <ticket> for the message below, with the elements <customer>, <order>, <product>, <date>, \
<problem>, <request>, <category> and <priority>.

Message:
{message}"""
_REPLIES = """\
You answer the customers of Harbour Lane, a shop for kitchen goods. Policy: broken or wrong goods are replaced free of \
charge within 60 days, money is returned within 14 days, and a prepaid label for the parcel is sent by email. Answer \
the message below in this form: thank the customer by name, repeat the order number and the problem, say what Harbour \
Lane will do, say what the customer should do next, and sign as the Harbour Lane team.

Message:
{message}"""


def _message(rng: random.Random) -> str:
    """A customer's message: who writes, which order, what is wrong, and what is wanted."""
    greeting, detail = rng.choice(_GREETINGS), rng.choice((*_DETAILS, ""))
    parts = [greeting, rng.choice(_CASES), detail, rng.choice(_WISHES)]
    parts += [] if "{name}" in greeting else ["Regards, {name}"]
    return " ".join(part for part in parts if part).format(
        name=rng.choice(_NAMES),
        product=rng.choice(_PRODUCTS),
        problem=rng.choice(_PROBLEMS),
        order=f"HL-{rng.randint(10000, 99999)}",
        date=f"{rng.randint(1, 28)} {rng.choice(_MONTHS)}",
        price=rng.randint(19, 399),
    )


def _requests(kind: str, instruction: str) -> Callable[[], Iterator[tuple[str, Any]]]:
    def prompts() -> Iterator[tuple[str, Any]]:
        rng, seen = random.Random(kind), set[str]()
        while len(seen) < COUNT:
            message = _message(rng)
            if message not in seen:
                yield f"{kind}[{len(seen)}]", {"prompt": instruction.format(message=message)}
                seen.add(message)

    return prompts


tickets = _requests("tickets", _TICKETS)  # a message as an XML record
replies = _requests("replies", _REPLIES)  # an answer by a shop's policy
