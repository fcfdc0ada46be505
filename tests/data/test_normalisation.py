"""Reads the spoken words back, with a parser of its own, and compares with what was written."""

import datetime
import hashlib
import random
import string
from decimal import Decimal
from fractions import Fraction

import pytest

from pynar.data import normalisation as nsw
from pynar.data import spoken
from pynar.data.normalisation import Example, corpus, exact_match, generate

UNITS = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen".split()
    )
}
TENS = {
    "twenty": 20,
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
    "sixty": 60,
    "seventy": 70,
    "eighty": 80,
    "ninety": 90,
}
DIGITS = {word: str(value) for word, value in UNITS.items() if value < 10} | {"oh": "0"}
ORDINALS = {
    "first": 1,
    "second": 2,
    "third": 3,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "seventh": 7,
    "eighth": 8,
    "ninth": 9,
    "tenth": 10,
    "eleventh": 11,
    "twelfth": 12,
    "thirteenth": 13,
    "fourteenth": 14,
    "fifteenth": 15,
    "sixteenth": 16,
    "seventeenth": 17,
    "eighteenth": 18,
    "nineteenth": 19,
    "twentieth": 20,
    "thirtieth": 30,
    "fortieth": 40,
    "fiftieth": 50,
    "sixtieth": 60,
    "seventieth": 70,
    "eightieth": 80,
    "ninetieth": 90,
}
MONTHS = {datetime.date(2000, month, 1).strftime("%B").lower(): month for month in range(1, 13)}
WHOLE_HOURS = {"noon": 12 * 60, "twelve noon": 12 * 60, "midnight": 0, "twelve midnight": 0}
PARTS_OF_DAY = {
    "a.m.": range(12),
    "p.m.": range(12, 24),
    "in the morning": range(1, 12),
    "in the afternoon": range(12, 18),
    "in the evening": range(18, 22),
    "at night": (22, 23, 0),
}


def two_digits(words: list[str]) -> int:
    """`forty five`, `seven`: below a hundred, nothing left over, no empty list."""
    match words:
        case [word] if word in UNITS:
            return UNITS[word]
        case [word] if word in TENS:
            return TENS[word]
        case [tens, ones] if tens in TENS and 0 < UNITS.get(ones, 0) < 10:
            return TENS[tens] + UNITS[ones]
    raise AssertionError(f"not a number below a hundred: {words}")


def cardinal(text: str) -> int:
    """Splits at the largest size; `and` may stand before the last two digits of a group only."""
    words = text.split()
    for size, name in ((1_000_000, "million"), (1_000, "thousand"), (100, "hundred")):
        if name in words:
            at = words.index(name)
            rest = words[at + 1 :]
            head = cardinal(" ".join(words[:at]))
            assert head > 0
            if not rest:
                return head * size
            if rest[0] == "and":
                tail = two_digits(rest[1:])
            else:
                tail = cardinal(" ".join(rest))
            assert 0 < tail < size
            return head * size + tail
    return two_digits(words)


def quantity(text: str) -> Fraction:
    """`two point five`, `three and a half`, `minus four`."""
    if text.startswith("minus "):
        return -quantity(text.removeprefix("minus "))
    if text.endswith(" and a half"):
        return cardinal(text.removesuffix(" and a half")) + Fraction(1, 2)
    whole, point, decimals = text.partition(" point ")
    value = Fraction(cardinal(whole))
    if point:
        figures = "".join(DIGITS[word] for word in decimals.split())
        value += Fraction(int(figures), 10 ** len(figures))
    return value


def ordinal(text: str) -> int:
    tens, _, last = text.rpartition(" ")
    return TENS[tens] + ORDINALS[last] if tens else ORDINALS[last]


def year(text: str) -> int:
    words = text.split()
    if "hundred" in words or "thousand" in words:
        return cardinal(text)
    # Two halves: find where the second begins.
    for at in range(1, len(words)):
        rest = words[at:]
        if rest[0] == "oh":
            return 100 * two_digits(words[:at]) + UNITS[rest[1]]
        try:
            head, tail = two_digits(words[:at]), two_digits(rest)
        except AssertionError:
            continue
        if tail >= 10 and head >= 10:
            return 100 * head + tail
    raise AssertionError(f"not a year: {text}")


def hour_word(text: str) -> int:
    hour = cardinal(text)
    assert 1 <= hour <= 12
    return hour


def clock_face(text: str) -> int:
    """Minutes after twelve o'clock, modulo twelve hours."""
    for start, minutes in (("a quarter past ", 15), ("half past ", 30), ("a quarter to ", -15)):
        if text.startswith(start):
            return (60 * hour_word(text.removeprefix(start)) + minutes) % 720
    if text.endswith(" o'clock"):
        return 60 * hour_word(text.removesuffix(" o'clock")) % 720
    hour, _, minute = text.partition(" ")
    if not minute:
        return 60 * hour_word(hour) % 720
    if minute.startswith("oh "):
        minutes = UNITS[minute.removeprefix("oh ")]
        assert 0 < minutes < 10
    else:
        minutes = cardinal(minute)
        assert 10 <= minutes < 60
    return (60 * hour_word(hour) + minutes) % 720


def time_of_day(text: str) -> int:
    """Minutes after midnight; the part of the day must fit exactly one half of it."""
    if text in WHOLE_HOURS:
        return WHOLE_HOURS[text]
    ((end, hours),) = ((end, hours) for end, hours in PARTS_OF_DAY.items() if text.endswith(end))
    face = clock_face(text.removesuffix(end).strip())
    (minutes,) = (m for m in (face, face + 720) if m // 60 in hours)
    return minutes


def day_and_month(words: list[str]) -> tuple[int, int, list[str]]:
    """Day, month and the words that follow them, for either order."""
    if words[0] == "the":
        of = words.index("of")
        return ordinal(" ".join(words[1:of])), MONTHS[words[of + 1].lower()], words[of + 2 :]
    end = next(i for i, word in enumerate(words) if word in ORDINALS) + 1
    return ordinal(" ".join(words[1:end])), MONTHS[words[0].lower()], words[end:]


def amount_of_money(text: str, one: str, many: str, hundredth: str, hundredths: str) -> int:
    words = text.split()
    unit = next((word for word in words if word in (one, many)), None)
    if unit is None:
        number, _, name = text.rpartition(" ")
        cents = cardinal(number)
        assert name == (hundredth if cents == 1 else hundredths)
        return cents
    at = words.index(unit)
    whole = cardinal(" ".join(words[:at]))
    assert unit == (one if whole == 1 else many)
    rest = words[at + 1 :]
    if not rest:
        return 100 * whole
    if rest[-1] in (hundredth, hundredths):
        cents = two_digits(rest[rest[0] == "and" : -1])
        assert rest[-1] == (hundredth if cents == 1 else hundredths)
    else:
        cents = two_digits(rest)
        assert cents >= 10
    return 100 * whole + cents


def assert_reads(part, parse, value):
    assert 1 <= len(part.readings) <= 8
    assert len(set(part.readings)) == len(part.readings)
    assert not any(set(reading) & set(string.digits) for reading in part.readings)
    assert {reading: parse(reading) for reading in part.readings} == dict.fromkeys(
        part.readings, value
    )


def test_the_parser_refuses_nonsense():
    for text in ("twenty thirty", "five twenty", "hundred", "one hundred and", "forty zero", ""):
        with pytest.raises(AssertionError):
            cardinal(text)
    assert cardinal("two million three hundred and forty thousand five hundred") == 2_340_500


def test_numbers_are_read_back():
    rng = random.Random(0)
    for n in [*range(10_000), *(rng.randrange(10_000, 10_000_000) for _ in range(3_000))]:
        part = spoken.number(n)
        assert int(part.written.replace(",", "")) == n
        assert_reads(part, cardinal, n)


def test_hundreds_and_the_british_and_are_readings():
    assert spoken.number(1200).readings == ("one thousand two hundred", "twelve hundred")
    assert spoken.number(105).readings == ("one hundred five", "one hundred and five")


def test_every_minute_of_the_day_is_read_back():
    for minutes in range(24 * 60):
        hour, minute = divmod(minutes, 60)
        part = spoken.clock_half(hour, minute)
        face, _, half = part.written.partition(" ")
        written_hour, _, written_minute = face.partition(":")
        written = int(written_hour) % 12 * 60 + int(written_minute or 0)
        assert written + (720 if half == "p.m." else 0) == minutes
        assert_reads(part, time_of_day, minutes)


def test_every_minute_of_the_clock_is_read_back():
    for hour in range(1, 13):
        for minute in range(60):
            part = spoken.clock(hour, minute)
            assert part.written == f"{hour}:{minute:02}"
            assert_reads(part, clock_face, (60 * hour + minute) % 720)
    assert spoken.clock(7, 45).readings == ("seven forty five", "a quarter to eight")


def test_every_day_of_a_leap_year_is_read_back():
    for n in range(366):
        day = datetime.date(2000, 1, 1) + datetime.timedelta(days=n)
        for month_first, pattern in ((False, "%d %B"), (True, "%B %d")):
            part = spoken.date(day.day, day.month, month_first=month_first)
            written = datetime.datetime.strptime(f"{part.written} 2000", f"{pattern} %Y")
            assert written.date() == day
            assert_reads(part, lambda text: day_and_month(text.split()), (day.day, day.month, []))


def test_dates_with_years_are_read_back():
    def parse(text):
        day, month, rest = day_and_month(text.split())
        return datetime.date(year(" ".join(rest)), month, day)

    first = datetime.date(1900, 1, 1)
    for n in range(0, 125 * 365, 11):
        day = first + datetime.timedelta(days=n)
        for month_first, pattern in ((False, "%d %B %Y"), (True, "%B %d, %Y")):
            part = spoken.date(day.day, day.month, day.year, month_first=month_first)
            assert datetime.datetime.strptime(part.written, pattern).date() == day
            assert_reads(part, parse, day)


def test_years_and_decades_are_read_back():
    for y in range(1100, 2100):
        assert_reads(spoken.year(y), year, y)
    for y in range(1920, 2000, 10):
        part = spoken.decade(y)
        assert part.written == f"{y}s"
        full, short = (reading.replace("ies", "y") for reading in part.readings)
        assert (year(full), TENS[short]) == (y, y % 100)
    assert spoken.year(2005).readings == ("two thousand five", "two thousand and five")


@pytest.mark.parametrize("symbol", spoken.CURRENCIES)
def test_every_price_is_read_back(symbol):
    for cents in [*range(1_000), 10_000, 12_000, 12_345, 20_005, 130_000, 99_999]:
        part = spoken.money(cents, symbol)
        assert part.written[0] == symbol
        assert Decimal(part.written[1:].replace(",", "")) * 100 == cents
        assert_reads(part, lambda text: amount_of_money(text, *spoken.CURRENCIES[symbol]), cents)


def test_one_of_a_currency_is_singular():
    assert spoken.money(100, "£").readings == ("one pound",)
    assert spoken.money(101, "£").readings == ("one pound and one penny", "one pound one penny")
    assert spoken.money(2, "£").readings == ("two pence",)


@pytest.mark.parametrize("scale", ["million", "billion"])
def test_fortunes_are_read_back(scale):
    for text in [*map(str, range(1, 200)), *(f"{n // 10}.{n % 10}" for n in range(10, 200))]:
        part = spoken.fortune(text, "€", scale)
        assert part.written == f"€{text} {scale}"
        ending = f" {scale} euros"
        assert all(reading.endswith(ending) for reading in part.readings)
        assert_reads(part, lambda t, e=ending: quantity(t.removesuffix(e)), Fraction(text))


def spoken_measure(text, unit):
    one, many = spoken.UNITS[unit]
    for half in (f"half a {one}", f"half an {one}"):
        if text == half:
            return Fraction(1, 2)
    if text.endswith(" below zero"):
        return -spoken_measure(text.removesuffix(" below zero"), unit)
    # The longest name first: "percent" is both.
    name = many if text.endswith(f" {many}") else one
    assert text.endswith(f" {name}")
    value = quantity(text.removesuffix(f" {name}"))
    assert name == (one if abs(value) == 1 else many)
    return value


@pytest.mark.parametrize("unit", spoken.UNITS)
def test_measures_are_read_back(unit):
    for text in [*map(str, range(1_000)), *(f"{n // 10}.{n % 10}" for n in range(200) if n % 10)]:
        part = spoken.measure(text, unit)
        assert part.written == (f"{text}%" if unit == "%" else f"{text} {unit}")
        assert_reads(part, lambda t: spoken_measure(t, unit), Fraction(text))


@pytest.mark.parametrize("unit", ["°C", "°F"])
def test_temperatures_are_read_back(unit):
    for degrees in range(-200, 200):
        part = spoken.temperature(degrees, unit)
        assert part.written == f"{degrees} {unit}"
        assert_reads(part, lambda text: spoken_measure(text, unit), degrees)


def test_half_an_hour_has_its_article():
    assert spoken.measure("0.5", "h").readings == ("zero point five hours", "half an hour")
    assert spoken.measure("0.5", "kg").readings == ("zero point five kilograms", "half a kilogram")


def test_decimals_are_read_back():
    for n in range(1_000):
        text = f"{n // 100}.{n % 100:02}"
        assert_reads(spoken.decimal(text), quantity, Fraction(text))
    assert spoken.decimal("3.14").readings == ("three point one four",)


def test_ordinals_are_read_back():
    endings = {}
    for n in range(1, 100):
        part = spoken.ordinal(n)
        assert part.written.startswith(str(n))
        endings.setdefault(part.written.removeprefix(str(n)), []).append(n)
        assert_reads(part, ordinal, n)
    assert endings["st"] == [1, 21, 31, 41, 51, 61, 71, 81, 91]
    assert (endings["nd"][:2], endings["rd"][:2]) == ([2, 22], [3, 23])
    assert sorted(endings) == ["nd", "rd", "st", "th"]


def test_fractions_are_read_back():
    names = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "eighth": 8, "tenth": 10}

    def parse(text):
        whole, _, share = text.rpartition(" and ")
        count, name = share.split()
        numerator = 1 if count in ("a", "an") else UNITS[count]
        assert (count == "an") <= (name == "eighth")
        assert count != "a" or name != "eighth"
        assert name.endswith("s") == (numerator > 1)
        value = Fraction(numerator, names[name.removesuffix("s")])
        return value + (cardinal(whole) if whole else 0)

    for denominator in set(names.values()):
        for numerator in range(1, denominator):
            if denominator == 2 or Fraction(numerator, denominator).denominator == denominator:
                for whole in range(10):
                    part = spoken.fraction(numerator, denominator, whole)
                    assert sum(map(Fraction, part.written.split())) == whole + Fraction(
                        numerator, denominator
                    )
                    assert_reads(part, parse, whole + Fraction(numerator, denominator))


def test_figures_are_read_back():
    def parse(text):
        words = text.split()
        if all(word in DIGITS for word in words):
            return "".join(DIGITS[word] for word in words)
        return str(cardinal(text) if "hundred" in words else pairs(words))

    def pairs(words):
        """`four seventeen` or `forty seventy one`: the second half has two digits."""
        for at in range(1, len(words)):
            try:
                head, tail = two_digits(words[:at]), two_digits(words[at:])
            except AssertionError:
                continue
            if tail >= 10:
                return 100 * head + tail
        raise AssertionError(words)

    for n in range(10_000):
        for text in {f"{n:03}", f"{n:04}"}:
            assert_reads(spoken.digits(text), parse, text)


def test_spans_and_scores_are_read_back():
    for first in range(1, 60):
        for last in (first + 1, first + 7, first + 40):
            part = spoken.span(first, last)
            assert part.written == f"{first}-{last}"
            to, through = part.readings
            assert tuple(map(cardinal, to.split(" to "))) == (first, last)
            assert tuple(map(cardinal, through.split(" through "))) == (first, last)
    goals = UNITS | {"nil": 0}
    for ours in range(10):
        for theirs in range(10):
            part = spoken.score(ours, theirs)
            assert part.written == f"{ours}-{theirs}"
            assert_reads(
                part,
                lambda text: tuple(goals[w] for w in text.split() if w != "to"),
                (ours, theirs),
            )


@pytest.fixture(scope="module")
def examples():
    return generate(5_000, seed=1)


def test_sources_are_distinct_and_targets_are_valid(examples):
    assert len({example.source for example in examples}) == len(examples)
    assert all(example.target in example.readings for example in examples)
    assert all(1 <= len(example.readings) <= 64 for example in examples)


def test_sentences_are_whole(examples):
    for example in examples:
        assert 4 <= len(example.source.split()) <= 12
        for text in (example.source, *example.readings):
            assert text[0].isupper() and text[-1] in ".?"
            assert not set(text) & set("{}")
            assert " ".join(text.split()) == text
            assert ".." not in text and ".?" not in text.replace("m.?", "")
        assert not any(set(text) & set(string.digits) for text in example.readings)


def test_carrier_words_are_few_and_kept(examples):
    carriers = {w for e in examples for w in e.source.strip(".?").split() if w.isalpha()}
    spoken = {w for e in examples for w in e.target.strip(".?").split()}
    assert len(carriers | spoken) < 700
    for example in examples:
        names = {w for w in example.source.strip(".?").split() if w.istitle() and w.isalpha()}
        assert all(names <= set(text.strip(".?").split()) for text in example.readings)


def test_every_template_and_slot_is_used(examples):
    slots = {slot for t in nsw._TEMPLATES for _, slot, _, _ in string.Formatter().parse(t) if slot}
    assert slots == set(nsw._PARTS) | set(nsw._WORDS)
    assert len(set(nsw._TEMPLATES)) == len(nsw._TEMPLATES)
    # Its own full stop would meet that of the sentence.
    assert not any(template.endswith("{ampm}.") for template in nsw._TEMPLATES)


def test_many_sources_have_several_readings_and_each_is_drawn():
    examples = generate(5_000, seed=2)
    assert sum(len(example.readings) > 1 for example in examples) > 0.6 * len(examples)
    # "nine" is the habit, "nine o'clock" the other way: one case of five.
    hours = [e for e in examples if any("o'clock" in reading for reading in e.readings)]
    assert 0.12 < sum("o'clock" in e.target for e in hours) / len(hours) < 0.28


def test_the_seed_decides_everything():
    assert generate(50, seed=3) == generate(50, seed=3)
    assert generate(50, seed=3) != generate(50, seed=4)
    assert generate(20, seed=3) == generate(50, seed=3)[:20]


def test_the_corpus_is_the_same_on_every_machine():
    lines = "\n".join(f"{e.source}\t{e.target}" for e in generate(1_000, seed=1))
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == "2f21acff5a09b5b1"


def test_excluded_sources_do_not_return():
    first = [example.source for example in generate(200, seed=5)]
    second = [example.source for example in generate(200, seed=5, exclude=first)]
    assert not set(first) & set(second)


def test_splits_share_no_source_and_tests_stay():
    train, valid, test = corpus(300, 50, 40, seed=1)
    sources = [{example.source for example in split} for split in (train, valid, test)]
    assert [len(split) for split in sources] == [300, 50, 40]
    assert len(set.union(*sources)) == 390
    assert corpus(30, 50, 40, seed=1)[1:] == (valid, test)


def test_exact_match_counts_any_reading():
    example = Example("It is 7:45.", "It is seven forty five.", frozenset({"a", "b"}))
    assert exact_match(["a", "b\n", "c", "A"], [example] * 4) == 50.0
    examples = generate(100, seed=6)
    assert exact_match([example.target for example in examples], examples) == 100.0
    assert exact_match([max(example.readings) for example in examples], examples) == 100.0
    assert exact_match([example.source for example in examples], examples) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: generate(0, seed=1), "`count` must be positive, got 0"),
        (lambda: generate(nsw.MAX_EXAMPLES + 1, seed=1), "at most 1,000,000 distinct"),
        (
            lambda: generate(nsw.MAX_EXAMPLES, seed=1, exclude=["It is 7:45."]),
            "got 1,000,000 and 1",
        ),
        (lambda: generate(1, seed=1, exclude="It is 7:45."), "got one string"),
        (lambda: corpus(1, 0, 1, seed=1), "`valid` must be positive, got 0"),
        (lambda: exact_match(["a"], []), "each of 0 examples, got 1"),
        (lambda: exact_match([], []), "must not be empty"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
