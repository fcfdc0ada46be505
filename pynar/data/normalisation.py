"""A generated corpus of English text normalisation: written sentences into spoken ones.

``The bus to Leeds leaves at 7:45.`` is read *The bus to Leeds leaves at seven forty five.* or
*... at a quarter to eight.* Many inputs have several correct readings, and the words of a reading
belong together. This is the one-to-many problem on which non-autoregressive models stand or fall,
in a corpus that needs no download and whose every output can be checked.

The file reads as a grammar, bottom up: number words, the written parts that have to be spoken,
how often each value is drawn, words, sentences, and the functions that make a corpus.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from string import Formatter

__all__ = ["Example", "corpus", "exact_match", "generate"]


@dataclass(frozen=True)
class Example:
    """A written sentence, one of its readings drawn at random, and all of them."""

    source: str
    target: str
    readings: frozenset[str]


@dataclass(frozen=True)
class Part:
    """What has to be spoken, as it is written, and each way to say it."""

    written: str
    readings: tuple[str, ...]


# Number words

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
_SIZES = ((1_000_000, "million"), (1_000, "thousand"), (100, "hundred"))
_IRREGULAR_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}


def spell(n: int, *, conjunction: bool = False) -> str:
    """Spells ``0 <= n < 10**9``, with the British *and* if ``conjunction``.

    There are no hyphens: this is speech, as a recogniser would write it down.

    >>> spell(2340), spell(1005, conjunction=True)
    ('two thousand three hundred forty', 'one thousand and five')
    """
    if n < 20:
        return _SMALL[n]
    if n < 100:
        tens, ones = divmod(n, 10)
        return f"{_TENS[tens]} {_SMALL[ones]}" if ones else _TENS[tens]
    size, name = next((size, name) for size, name in _SIZES if n >= size)
    head, rest = divmod(n, size)
    words = f"{spell(head, conjunction=conjunction)} {name}"
    if not rest:
        return words
    link = " and " if conjunction and rest < 100 else " "
    return words + link + spell(rest, conjunction=conjunction)


def spell_ordinal(n: int) -> str:
    """Spells the ordinal of ``1 <= n < 100``.

    >>> spell_ordinal(3), spell_ordinal(21), spell_ordinal(40)
    ('third', 'twenty first', 'fortieth')
    """
    tens, space, last = spell(n).rpartition(" ")
    if last in _IRREGULAR_ORDINALS:
        last = _IRREGULAR_ORDINALS[last]
    else:
        last = (last[:-1] + "ie" if last.endswith("y") else last) + "th"
    return tens + space + last


def spell_digits(text: str, *, zero: str = "zero") -> str:
    """Spells one digit after the other.

    >>> spell_digits("405"), spell_digits("405", zero="oh")
    ('four zero five', 'four oh five')
    """
    return " ".join(zero if digit == "0" else _SMALL[int(digit)] for digit in text)


def _distinct(*readings: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(readings))


def _cardinals(n: int) -> tuple[str, ...]:
    readings = [spell(n), spell(n, conjunction=True)]
    if 1_000 < n < 10_000 and n % 100 == 0 and n % 1_000:
        readings.append(f"{spell(n // 100)} hundred")
    return _distinct(*readings)


def _amounts(text: str) -> tuple[str, ...]:
    """Readings of a whole or decimal number as it is written, ``"300"`` or ``"2.5"``."""
    whole, _, decimals = text.partition(".")
    if not decimals:
        return _cardinals(int(whole))
    readings = [f"{number} point {spell_digits(decimals)}" for number in _cardinals(int(whole))]
    if decimals == "5" and whole != "0":
        readings += [f"{number} and a half" for number in _cardinals(int(whole))]
    return tuple(readings)


# The parts of a sentence that have to be spoken

MONTHS = (
    "January February March April May June July August September October November December"
).split()

# symbol: one, many, one hundredth, many hundredths
CURRENCIES = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "€": ("euro", "euros", "cent", "cents"),
}

# symbol: one, many
UNITS = {
    "%": ("percent", "percent"),
    "°C": ("degree Celsius", "degrees Celsius"),
    "°F": ("degree Fahrenheit", "degrees Fahrenheit"),
    "g": ("gram", "grams"),
    "kg": ("kilogram", "kilograms"),
    "lb": ("pound", "pounds"),
    "oz": ("ounce", "ounces"),
    "ml": ("millilitre", "millilitres"),
    "l": ("litre", "litres"),
    "cm": ("centimetre", "centimetres"),
    "m": ("metre", "metres"),
    "km": ("kilometre", "kilometres"),
    "ft": ("foot", "feet"),
    "mi": ("mile", "miles"),
    "km/h": ("kilometre per hour", "kilometres per hour"),
    "mph": ("mile per hour", "miles per hour"),
    "s": ("second", "seconds"),
    "min": ("minute", "minutes"),
    "h": ("hour", "hours"),
    "MB": ("megabyte", "megabytes"),
    "GB": ("gigabyte", "gigabytes"),
}

# denominator: one, many, for each of its names
_FRACTIONS = {
    2: (("half", "halves"),),
    3: (("third", "thirds"),),
    4: (("quarter", "quarters"), ("fourth", "fourths")),
    5: (("fifth", "fifths"),),
    8: (("eighth", "eighths"),),
    10: (("tenth", "tenths"),),
}


def _article(noun: str) -> str:
    return "an" if noun in ("eighth", "hour", "ounce") else "a"


def number(n: int) -> Part:
    """``1,200``: *one thousand two hundred*, *twelve hundred*."""
    return Part(f"{n:,}", _cardinals(n))


def span(first: int, last: int) -> Part:
    """``10-15``: *ten to fifteen*, *ten through fifteen*."""
    ends = spell(first), spell(last)
    return Part(f"{first}-{last}", (" to ".join(ends), " through ".join(ends)))


def score(ours: int, theirs: int) -> Part:
    """``3-1``: *three to one*, *three one*; ``3-0``: *three to zero*, *three nil*."""
    long = f"{spell(ours)} to {spell(theirs)}"
    short = " ".join(spell(goals) if goals else "nil" for goals in (ours, theirs))
    return Part(f"{ours}-{theirs}", (long, short))


def ordinal(n: int) -> Part:
    """``21st``: *twenty first*."""
    suffix = "th" if 10 < n % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return Part(f"{n}{suffix}", (spell_ordinal(n),))


def decimal(text: str) -> Part:
    """``3.14``: *three point one four*."""
    return Part(text, _amounts(text))


def fraction(numerator: int, denominator: int, whole: int = 0) -> Part:
    """``3/4``: *three quarters*, *three fourths*; ``1 1/2``: *one and a half*, *... one half*."""
    names = _FRACTIONS[denominator]
    if numerator == 1:
        readings = [f"{head} {one}" for one, _ in names for head in (_article(one), "one")]
    else:
        readings = [f"{spell(numerator)} {many}" for _, many in names]
    written = f"{numerator}/{denominator}"
    if whole:
        written = f"{whole} {written}"
        readings = [f"{spell(whole)} and {reading}" for reading in readings]
    return Part(written, tuple(readings))


def digits(text: str) -> Part:
    """``417``: *four one seven*, *four seventeen*; ``4071``: *four zero seven one*, *forty ...*."""
    readings = [spell_digits(text), spell_digits(text, zero="oh")]
    head, tail = text[:-2], text[-2:]
    if len(text) in (3, 4) and head[0] != "0":
        if tail[0] != "0":
            readings.append(f"{spell(int(head))} {spell(int(tail))}")
        elif tail == "00" and len(text) == 3:
            readings.append(f"{spell(int(head))} hundred")
    return Part(text, _distinct(*readings))


def year(y: int) -> Part:
    """``1905``: *nineteen oh five*; ``2019``: *twenty nineteen*, *two thousand nineteen*."""
    century, rest = divmod(y, 100)
    head = spell(century)
    if century == 20 and rest < 10:
        readings = _cardinals(y)
    elif rest == 0:
        readings = (f"{head} hundred",)
    elif rest < 10:
        readings = (f"{head} oh {spell(rest)}", f"{head} hundred and {spell(rest)}")
    elif century < 20:
        readings = (f"{head} {spell(rest)}",)
    else:
        readings = (f"{head} {spell(rest)}", *_cardinals(y))
    return Part(str(y), readings)


def decade(y: int) -> Part:
    """``1980s``: *nineteen eighties*, *eighties*; the twenties are the first."""
    short = spell(y % 100)[:-1] + "ies"
    return Part(f"{y}s", (f"{spell(y // 100)} {short}", short))


def date(day: int, month: int, y: int | None = None, *, month_first: bool = False) -> Part:
    """``3 May 2019`` or ``May 3, 2019``: *the third of May twenty nineteen*, *May third ...*.

    People read either as they are used to, whichever way it is written.
    """
    name = MONTHS[month - 1]
    written = f"{name} {day}" if month_first else f"{day} {name}"
    readings = (f"the {spell_ordinal(day)} of {name}", f"{name} {spell_ordinal(day)}")
    if y is None:
        return Part(written, readings)
    return Part(
        f"{written}{',' if month_first else ''} {y}",
        tuple(f"{reading} {spoken}" for reading in readings for spoken in year(y).readings),
    )


def _digital(hour: int, minute: int) -> str:
    if minute == 0:
        return spell(hour)
    return f"{spell(hour)} {'oh ' if minute < 10 else ''}{spell(minute)}"


def _analogue(hour: int, minute: int) -> str:
    """*Seven o'clock*, *a quarter past seven*, *half past seven*, *a quarter to eight*."""
    following = hour % 12 + 1
    return {
        0: f"{spell(hour)} o'clock",
        15: f"a quarter past {spell(hour)}",
        30: f"half past {spell(hour)}",
        45: f"a quarter to {spell(following)}",
    }[minute]


def _part_of_day(hour: int) -> str:
    if 1 <= hour < 12:
        return "in the morning"
    if 12 <= hour < 18:
        return "in the afternoon"
    return "in the evening" if 18 <= hour < 22 else "at night"


def clock(hour: int, minute: int) -> Part:
    """``7:45``: *seven forty five*, *a quarter to eight*; ``7:40``: *seven forty*."""
    readings = [_digital(hour, minute)]
    if minute % 15 == 0:
        readings.append(_analogue(hour, minute))
    return Part(f"{hour}:{minute:02}", tuple(readings))


def clock_half(hour: int, minute: int) -> Part:
    """``7:45 p.m.`` for 19:45: *seven forty five p.m.*, *a quarter to eight in the evening*."""
    half = "a.m." if hour < 12 else "p.m."
    twelve = (hour - 1) % 12 + 1
    if minute == 0 and twelve == 12:
        name = "midnight" if hour == 0 else "noon"
        return Part(f"12 {half}", (name, f"twelve {name}"))
    readings = [f"{_digital(twelve, minute)} {half}"]
    if minute % 15 == 0:
        readings.append(f"{_analogue(twelve, minute)} {_part_of_day(hour)}")
    written = f"{twelve}:{minute:02}" if minute else str(twelve)
    return Part(f"{written} {half}", tuple(readings))


def money(cents: int, symbol: str = "$") -> Part:
    """``$2.50``: *two dollars and fifty cents*, *two dollars fifty*; ``$0.75``; ``$300``."""
    one, many, hundredth, hundredths = CURRENCIES[symbol]
    whole, rest = divmod(cents, 100)
    small = f"{spell(rest)} {hundredth if rest == 1 else hundredths}"
    if not rest:
        unit = one if whole == 1 else many
        return Part(f"{symbol}{whole:,}", tuple(f"{n} {unit}" for n in _cardinals(whole)))
    written = f"{symbol}{whole:,}.{rest:02}"
    if not whole:
        return Part(written, (small,))
    # "two dollars five" is not said.
    short = spell(rest) if rest >= 10 else small
    large = [f"{n} {one if whole == 1 else many}" for n in _cardinals(whole)]
    return Part(written, tuple(f"{n} {tail}" for n in large for tail in (f"and {small}", short)))


def fortune(text: str, symbol: str = "$", scale: str = "million") -> Part:
    """``$3.5 million``: *three point five million dollars*, *three and a half ...*."""
    _, many, _, _ = CURRENCIES[symbol]
    return Part(f"{symbol}{text} {scale}", tuple(f"{n} {scale} {many}" for n in _amounts(text)))


def measure(text: str, unit: str) -> Part:
    """``1 kg``: *one kilogram*; ``2.5 kg``: *two point five kilograms*, *two and a half ...*."""
    one, many = UNITS[unit]
    readings = tuple(f"{n} {one if text == '1' else many}" for n in _amounts(text))
    if text == "0.5":
        readings += (f"half {_article(one)} {one}",)
    return Part(f"{text}{'' if unit == '%' else ' '}{unit}", readings)


def temperature(degrees: int, unit: str = "°C") -> Part:
    """``-5 °C``: *minus five degrees Celsius*, *five degrees Celsius below zero*."""
    if degrees >= 0:
        return measure(str(degrees), unit)
    below = measure(str(-degrees), unit).readings
    readings = (reading for n in below for reading in (f"minus {n}", f"{n} below zero"))
    return Part(f"{degrees} {unit}", tuple(readings))


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
