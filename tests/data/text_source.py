"""Small parallel text for the tests, made from a seed."""

import random

SYLLABLES = ["ba", "de", "ki", "lo", "mu", "na", "pe", "ri", "so", "tu", "ve", "zi"]


def words(count: int, seed: int) -> list[str]:
    """Returns distinct invented words."""
    rng = random.Random(seed)
    found: set[str] = set()
    while len(found) < count:
        found.add("".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 4))))
    return sorted(found)


def parallel_text(count: int, seed: int = 0, longest: int = 12) -> tuple[list[str], list[str]]:
    """Returns sources and targets of different lengths, target words being source words shouted."""
    rng = random.Random(seed)
    vocabulary = words(60, seed=7)
    sources, targets = [], []
    for _ in range(count):
        sentence = [rng.choice(vocabulary) for _ in range(rng.randint(1, longest))]
        sources.append(" ".join(sentence))
        targets.append(" ".join(word.upper() for word in sentence[: rng.randint(1, 12)][::-1]))
    return sources, targets
