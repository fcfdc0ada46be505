"""English figures as they are written, and every way to say them.

Number words first, then the written parts of a sentence that have to be spoken.
"""

from __future__ import annotations

from dataclasses import dataclass


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
