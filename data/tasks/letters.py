"""Words looked at letter by letter, which tokens hide: writing one backwards, and counting a letter in it.

    reverse: lamper=          repmal
    count: a in banada=       3

The words are made of syllables, so there are as many as wanted, and are held out by a hash of the word.
"""

import zlib

import numpy as np

from data.tasks.problems import Problem, Task

_ONSETS, _VOWELS, _CODAS = list("bdfgklmnprstvz"), list("aeiou"), ["", "", "l", "m", "n", "r", "s", "t"]
_HELD_OUT_OF = 16


def reversal(count: int = 4096, syllables: int = 3, seed: int = 0) -> Task:
    """Writing a word backwards. Rewards: right; and, unweighted, the share of letters that stand in their place."""
    train, held_out = _words(count, syllables, seed)
    rewards = {"correct": correct, "letters": letters}
    return Task("reversal", _reversals(train), _reversals(held_out), rewards, {"correct": 1.0, "letters": 0.0}, verifier="correct")


def counting(count: int = 4096, syllables: int = 4, seed: int = 0) -> Task:
    """How often a letter stands in a word, one of its own letters or any other."""
    train, held_out = _words(count, syllables, seed)
    rng = np.random.default_rng((seed, 1))
    return Task("counting", _countings(train, rng), _countings(held_out, rng), {"correct": correct}, {"correct": 1.0}, verifier="correct")


def _words(count: int, syllables: int, seed: int) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    train: dict[str, None] = {}
    held_out: dict[str, None] = {}
    wanted = max(1, count // _HELD_OUT_OF)
    while len(train) < count or len(held_out) < wanted:
        word = "".join(str(rng.choice(part)) for _ in range(syllables) for part in (_ONSETS, _VOWELS, _CODAS))
        part, most = (held_out, wanted) if zlib.crc32(word.encode()) % _HELD_OUT_OF == 0 else (train, count)
        if len(part) < most:
            part[word] = None
    return list(train), list(held_out)


def _reversals(words: list[str]) -> list[Problem]:
    return [Problem(f"reverse: {word}=", {"answer": word[::-1]}, solution=word[::-1]) for word in words]


def _countings(words: list[str], rng: np.random.Generator) -> list[Problem]:
    made = []
    for word in words:
        letter = str(rng.choice(list(word))) if rng.random() < 0.8 else str(rng.choice(list("abcdefghijklmnopqrstuvwxyz")))
        made.append(Problem(f"count: {letter} in {word}=", {"answer": str(word.count(letter))}, solution=str(word.count(letter))))
    return made


def correct(problem: Problem, answer: str) -> float:
    """1 for exactly the answer, but for spaces around it."""
    return float(answer.strip() == problem.facts["answer"])


def letters(problem: Problem, answer: str) -> float:
    """The share of the letters, of the longer of the two, that stand in their place."""
    wanted, written = problem.facts["answer"], answer.strip()
    return sum(a == b for a, b in zip(wanted, written, strict=False)) / max(len(wanted), len(written), 1)
