"""A generated corpus of English text normalisation: written sentences into spoken ones.

``The bus to Leeds leaves at 7:45.`` is read *The bus to Leeds leaves at seven forty five.* or
*... at a quarter to eight.* Many inputs have several correct readings, and the words of a reading
belong together. This is the one-to-many problem on which non-autoregressive models stand or fall,
in a corpus that needs no download and whose every output can be checked.

The file reads as a grammar, bottom up: how often each written part that has to be spoken
(`pynar.data.spoken`) is drawn, words, sentences, and the functions that make a corpus.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from string import Formatter

from pynar.data.spoken import (
    CURRENCIES,
    Part,
    clock,
    clock_half,
    date,
    decade,
    decimal,
    digits,
    fortune,
    fraction,
    measure,
    money,
    number,
    ordinal,
    score,
    span,
    temperature,
    year,
)

__all__ = ["Example", "corpus", "exact_match", "generate"]


@dataclass(frozen=True)
class Example:
    """A written sentence, one of its readings drawn at random, and all of them."""

    source: str
    target: str
    readings: frozenset[str]


# How often each value is drawn


def _one_of(*choices: Callable[[random.Random], Part]) -> Callable[[random.Random], Part]:
    return lambda rng: rng.choice(choices)(rng)


def _whole(rng: random.Random) -> int:
    """A whole quantity as people write it: small, or rounded to tens."""
    return rng.choice((1 + rng.randrange(9), rng.randrange(10, 100), 10 * rng.randrange(10, 100)))


def _amount(rng: random.Random, below: int = 1_000) -> str:
    """A quantity: mostly whole, else with a half or one decimal."""
    kind = rng.randrange(10)
    if kind < 7:
        return str(1 + (_whole(rng) - 1) % (below - 1))
    whole = rng.randrange(10)
    return f"{whole}.5" if kind == 7 else f"{whole}.{rng.randrange(1, 10)}"


def _round_thousands(rng: random.Random) -> int:
    """A large number with few digits that count: 27,000, 610,000, 2,400,000."""
    return rng.randrange(11, 100) * rng.choice((1_000, 10_000, 100_000))


def _units(*units: str, below: int = 1_000) -> Callable[[random.Random], Part]:
    return lambda rng: measure(_amount(rng, below), rng.choice(units))


def _minute(rng: random.Random) -> int:
    """Timetables like the quarters, then the fives."""
    return rng.choice((15 * rng.randrange(4), 15 * rng.randrange(4), 5 * rng.randrange(12)))


def _year(rng: random.Random) -> int:
    return rng.randrange(1900, 2025)


def _currency(rng: random.Random) -> str:
    return rng.choice(tuple(CURRENCIES))


def _fortune(rng: random.Random) -> Part:
    text = str(rng.randrange(1, 100))
    if rng.random() < 0.3:
        text = f"{rng.randrange(1, 10)}.{rng.choice((5, 5, rng.randrange(1, 10)))}"
    return fortune(text, _currency(rng), rng.choice(("million", "billion")))


# No 29 February, so that no year needs to know whether it leaps.
_MONTH_LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def _day(rng: random.Random, y: int | None = None) -> Part:
    month = 1 + rng.randrange(12)
    day = 1 + rng.randrange(_MONTH_LENGTHS[month - 1])
    return date(day, month, y, month_first=rng.random() < 0.5)


def _fraction(rng: random.Random, *, whole: bool = False) -> Part:
    choices = ((1, 2), (1, 3), (2, 3), (1, 4), (3, 4), (2, 5), (3, 5), (1, 8), (3, 8), (7, 10))
    numerator, denominator = rng.choice(choices[:5] if whole else choices)
    return fraction(numerator, denominator, 1 + rng.randrange(9) if whole else 0)


def _win(rng: random.Random) -> Part:
    theirs = rng.randrange(4)
    return score(theirs + 1 + rng.randrange(4), theirs)


def _span(rng: random.Random) -> Part:
    first = 1 + rng.randrange(80)
    return span(first, first + 1 + rng.randrange(19))


_PARTS: dict[str, Callable[[random.Random], Part]] = {
    "time": lambda rng: clock(1 + rng.randrange(12), _minute(rng)),
    # Its "p.m." would run into a full stop: no template ends with it.
    "ampm": lambda rng: clock_half(rng.randrange(5, 24), _minute(rng)),
    "day": _day,
    "date": lambda rng: _day(rng, _year(rng)),
    "year": lambda rng: year(_year(rng)),
    "decade": lambda rng: decade(1920 + 10 * rng.randrange(8)),
    "money": _one_of(
        lambda rng: money(100 * _whole(rng), _currency(rng)),
        lambda rng: money(5 * rng.randrange(20, 2_000), _currency(rng)),
    ),
    "fortune": _fortune,
    "number": _one_of(
        # More than one, for the plural that follows.
        lambda rng: number(max(2, _whole(rng))),
        lambda rng: number(100 * rng.randrange(11, 100)),
    ),
    "large": lambda rng: number(_round_thousands(rng)),
    "weight": _units("kg", "g", "lb", "oz"),
    "volume": _units("ml", "l"),
    "distance": _units("km", "m", "mi", "ft"),
    "height": _units("m", "ft"),
    "width": _units("cm", "m"),
    "duration": _units("s", "min", "h", below=100),
    "speed": _units("km/h", "mph"),
    "storage": _units("MB", "GB"),
    "percent": _units("%", below=100),
    "temperature": lambda rng: temperature(rng.randrange(-30, 40), rng.choice(("°C", "°F"))),
    "decimal": lambda rng: decimal(f"{rng.randrange(10)}.{rng.randrange(100):02}"),
    "fraction": _fraction,
    "mixed": lambda rng: _fraction(rng, whole=True),
    "ordinal": lambda rng: ordinal(rng.randrange(1, 100)),
    "span": _span,
    "win": _win,
    "room": lambda rng: digits(str(rng.randrange(100, 1_000))),
    "code": lambda rng: digits(f"{rng.randrange(10_000):04}"),
}


# Words

_WORDS: dict[str, Sequence[str]] = {
    slot: words.split()
    for slot, words in {
        "name": (
            "Adam Alice Anna Ben Carla Clara David Emma Frank George Grace Hannah Henry Ines Jack "
            "Julia Karim Laura Leo Lucy Maria Martin Nadia Nora Oscar Paul Peter Rosa Sam Sarah "
            "Thomas Victor"
        ),
        "city": (
            "Athens Berlin Boston Bristol Cairo Chicago Delhi Dublin Geneva Leeds Lima Lisbon "
            "London Madrid Milan Munich Naples Oslo Oxford Paris Prague Rome Sydney Tokyo Toronto "
            "Vienna York Zurich"
        ),
        "rival": "Bath Derby Dover Genoa Lyon Porto Turin Wells",
        "vehicle": "boat bus coach ferry plane tram train",
        "shop": "bakery bank café cinema gallery library market museum office pool school theatre",
        "building": "bridge castle chapel church factory hotel mill palace station tower",
        "event": "ball concert course fair lecture meeting party play show talk",
        "item": (
            "bag bicycle book camera chair clock coat desk guitar jacket lamp mirror phone radio "
            "table tent"
        ),
        "food": "bread butter cheese flour fruit honey meat pasta rice salt sugar",
        "liquid": "cream juice milk oil soup water",
        "people": "children doctors guests members players students teachers visitors workers",
        "things": "birds boats books cars coins letters maps paintings stamps trees",
        "contest": "contest cup exam game league quiz race",
        "weekday": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        "instrument": "cello drums flute harp piano violin",
    }.items()
}


# Sentences

_TEMPLATES = (
    # times
    "The {vehicle} to {city} leaves at {time}.",
    "The {vehicle} from {city} was due at {time} on {weekday}.",
    "{name} woke up at {time} and went to the {shop}.",
    "Please call {name} at {ampm} tomorrow.",
    "The {shop} opens at {ampm} every {weekday}.",
    "Can we meet {name} at the {shop} at {ampm}?",
    "The {event} begins at {time} and costs {money}.",
    "The {event} at the {shop} ends at {time}.",
    "Take the {vehicle} at {ampm} and get off in {city}.",
    # dates
    "{name} was born on {date} in {city}.",
    "The {event} takes place on {day}.",
    "The {event} was moved to {day} at {time}.",
    "{name} signed the contract on {date}.",
    "The {shop} first opened on {date}.",
    "The {event} of {day} was in {city}.",
    "Please pay {money} before {day}.",
    "On {day} the {vehicle} leaves at {time}.",
    "{name} left {city} on {day} and came back in {year}.",
    "{name} wrote the letter on {day} at {time}.",
    "The letter of {date} was sent to {name}.",
    "{name} met us in {city} on {date}.",
    # years
    "{name} moved to {city} in {year}.",
    "The {building} was built in {year} for {fortune}.",
    "{name} played the {instrument} in the {decade}.",
    "In {year} the {shop} had {number} {people}.",
    "The {building} in {city} dates from the {decade}.",
    "Since {year} the {shop} has sold {number} {things}.",
    # money
    "{name} paid {money} for the {item}.",
    "The {item} costs {money} in {city}.",
    "{name} owes me {money} for the {food}.",
    "The {shop} lost {fortune} in {year}.",
    "The {vehicle} ticket to {city} costs {money}.",
    "I got {percent} off and paid {money} for the {item}.",
    "{name} sold the {building} for {fortune}.",
    # measures
    "Add {weight} of {food} to the bowl.",
    "{name} bought {volume} of {liquid} for {money}.",
    "{name} ran {distance} in {duration}.",
    "The {item} weighs {weight}.",
    "The {building} is {height} high.",
    "The {item} is {width} wide and costs {money}.",
    "The road to {city} is {distance} long.",
    "The wind near {city} reached {speed} on {day}.",
    "{name} sent me a file of {storage} at {time}.",
    "It was {temperature} in {city} on {day}.",
    "Keep the {food} at {temperature} for {duration}.",
    "It was {temperature} in {city} at {time}.",
    # shares and decimals
    "Prices in {city} rose by {percent} in {year}.",
    "About {fraction} of the {people} live in {city}.",
    "{name} used {fraction} of the {food}.",
    "The recipe needs {mixed} cups of {liquid}.",
    "The test of {day} gave a value of {decimal}.",
    # counts
    "The {event} in {city} drew {number} {people}.",
    "The region around {city} has {large} inhabitants.",
    "{name} counted {number} {things} in {duration}.",
    "The {shop} sold {large} {things} in {year}.",
    # ranks, pages, scores, digits
    "{name} finished {ordinal} in the {contest} of {year}.",
    "This is the {ordinal} {event} in {city}.",
    "Read pages {span} before {weekday}.",
    "{city} won {win} against {rival}.",
    "{name} is waiting in room {room}.",
    "Flight {room} to {city} leaves at {time}.",
    "The code for the {building} is {code}.",
    "Dial {code} and ask for {name}.",
)


def _say(rng: random.Random, part: Part) -> str:
    """Draws a reading: the first is a habit, as in real text, where no two ways are equally common.

    Of two readings the first comes in four cases of five. Were they even, a teacher's choice
    between them would hang on chance, and distillation could not make its targets consistent.
    """
    return part.readings[0] if rng.random() < 0.6 else rng.choice(part.readings)


def _draw(rng: random.Random) -> Example:
    source, target = "", ""
    choices: list[tuple[str, ...]] = []
    for literal, slot, _, _ in Formatter().parse(rng.choice(_TEMPLATES)):
        if slot is None:  # what follows the last slot
            part = Part("", ("",))
        elif slot in _WORDS:
            word = rng.choice(_WORDS[slot])
            part = Part(word, (word,))
        else:
            part = _PARTS[slot](rng)
        source += literal + part.written
        target += literal + _say(rng, part)
        choices.append(tuple(literal + reading for reading in part.readings))
    readings = frozenset("".join(parts) for parts in itertools.product(*choices))
    return Example(source, target, readings)


# Corpora

# The grammar can give many more: of a million draws, four in five are distinct.
MAX_EXAMPLES = 1_000_000


def generate(count: int, *, seed: int, exclude: Collection[str] = ()) -> list[Example]:
    """Draws ``count`` examples with distinct sources, none of them in ``exclude``.

    The same seed gives the same examples on every machine, and a smaller ``count`` gives the
    beginning of a larger one.

    >>> example = generate(1, seed=1)[0]
    >>> example.target in example.readings
    True
    """
    if count < 1:
        raise ValueError(f"generate: `count` must be positive, got {count}")
    if isinstance(exclude, str):
        raise ValueError("generate: `exclude` must be a collection of sources, got one string")
    if count + len(exclude) > MAX_EXAMPLES:
        raise ValueError(
            f"generate: `count` and `exclude` together must be at most {MAX_EXAMPLES:,} distinct "
            f"sentences, got {count:,} and {len(exclude):,}"
        )
    rng = random.Random(seed)
    seen = set(exclude)
    examples: list[Example] = []
    while len(examples) < count:
        example = _draw(rng)
        if example.source not in seen:
            seen.add(example.source)
            examples.append(example)
    return examples


def corpus(
    train: int, valid: int, test: int, *, seed: int
) -> tuple[list[Example], list[Example], list[Example]]:
    """Draws three splits that share no source.

    Test and validation do not change with the size of the training set.

    >>> train, valid, test = corpus(100, 10, 10, seed=1)
    >>> len(train), len(valid), len(test)
    (100, 10, 10)
    """
    for name, size in (("train", train), ("valid", valid), ("test", test)):
        if size < 1:
            raise ValueError(f"corpus: `{name}` must be positive, got {size}")
    examples = generate(train + valid + test, seed=seed)
    held_out = test + valid
    return examples[held_out:], examples[test:held_out], examples[:test]


def exact_match(hypotheses: Sequence[str], examples: Sequence[Example]) -> float:
    """Percentage of hypotheses that are one of the valid readings of their example.

    Space around a hypothesis does not count; every letter and full stop does.

    >>> example = Example("It is 7:45.", "It is seven forty five.",
    ...                   frozenset({"It is seven forty five.", "It is a quarter to eight."}))
    >>> exact_match(["It is a quarter to eight.", "It is a quarter to nine."], [example] * 2)
    50.0
    """
    if len(hypotheses) != len(examples):
        raise ValueError(
            f"exact_match: need one hypothesis for each of {len(examples)} examples, "
            f"got {len(hypotheses)}"
        )
    if not examples:
        raise ValueError("exact_match: `examples` must not be empty")
    pairs = zip(hypotheses, examples, strict=True)
    return 100.0 * sum(h.strip() in example.readings for h, example in pairs) / len(examples)
