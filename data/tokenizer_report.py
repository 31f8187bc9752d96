"""How well a tokenizer fits a text: `measure` gives the figures of one tokenizer on some documents.

Fertility is the mean number of tokens a word is cut into (Rust et al. 2021, arXiv:2012.15613); a word is what stands between
white space, and it is encoded with the space before it, as inside a line.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from data.tokenizer import Tokenizer

TEXT_AT_ONCE = 1 << 20  # characters encoded in one call
WORDS_AT_ONCE = 1 << 14
RARE_BELOW = 10  # occurrences


def measure(tokenizer: Tokenizer, texts: Iterable[str], *, worst: int = 20) -> tuple[dict[str, Any], np.ndarray]:
    """The figures as JSON, and how often each id occurs (int64, `[vocab_size]`).

    **Arguments:**

    - `texts`: read once, some at a time; memory grows with the number of different words.
    - `worst`: how many of the costliest words to list: those with most tokens beyond the first in the text as a whole.
    """
    use = np.zeros(tokenizer.vocab_size, np.int64)
    words: Counter[str] = Counter()
    documents = text_bytes = changed = 0
    for some in _batches(texts):
        for text, tokens in zip(some, tokenizer.encode_batch(some), strict=True):
            use += np.bincount(tokens, minlength=len(use))
            words.update(text.split())
            documents += 1
            text_bytes += len(text.encode())
            changed += tokenizer.decode(tokens, skip_special_tokens=False) != text
    if not use.any():
        raise ValueError("there is no text to measure the tokenizer on")
    tokens_of_word = _tokens_of_words(tokenizer, words)
    total, occurrences = int(use.sum()), sum(words.values())
    costly = sorted(words, key=lambda word: (-words[word] * (tokens_of_word[word] - 1), word))[:worst]
    figures = {
        "documents": documents,
        "bytes": text_bytes,
        "tokens": total,
        "bytes_per_token": text_bytes / total,
        "words": occurrences,
        "fertility": sum(words[word] * tokens_of_word[word] for word in words) / max(occurrences, 1),
        "words_in_one_token": sum(words[word] for word in words if tokens_of_word[word] == 1) / max(occurrences, 1),
        "documents_not_restored": changed,  # decode(encode(text)) is another text
        "worst_words": [
            {
                "word": word,
                "times": words[word],
                "tokens": tokens_of_word[word],
                "pieces": tokenizer.tokens_of(tokenizer.encode(f" {word}")),
            }
            for word in costly
        ],
    }
    return figures, use


def vocabulary_use(use: np.ndarray) -> dict[str, Any]:
    """What a text makes of the vocabulary, from the counts of `measure`."""
    shares = use[use > 0] / max(use.sum(), 1)
    return {
        "size": len(use),
        "used": int((use > 0).sum()),
        "used_share": float((use > 0).mean()),
        "rare": int(((use > 0) & (use < RARE_BELOW)).sum()),  # they hardly get a gradient
        "effective_size": float(np.exp(-(shares * np.log(shares)).sum())),  # equally frequent tokens of the same entropy
    }


def _tokens_of_words(tokenizer: Tokenizer, words: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    every = list(words)
    for start in range(0, len(every), WORDS_AT_ONCE):
        some = every[start : start + WORDS_AT_ONCE]
        found |= {word: len(tokens) for word, tokens in zip(some, tokenizer.encode_batch([f" {word}" for word in some]), strict=True)}
    return found


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    some: list[str] = []
    characters = 0
    for text in texts:
        some.append(text)
        characters += len(text)
        if characters >= TEXT_AT_ONCE:
            yield some
            some, characters = [], 0
    if some:
        yield some


def visible(piece: str) -> str:
    """A token as it is drawn: line ends and tabs as marks (a line end still ends the line)."""
    return re.sub(r"\r", "←", piece).replace("\t", "⇥").replace("\n", "↵\n")
