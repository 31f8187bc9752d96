"""A tokenizer and documents small enough to read, for the tests of this folder."""

import grain
import pytest
from loguru import logger

from data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat, the dog ate the log\n" * 9], 283)


@pytest.fixture(scope="session")
def documents() -> grain.MapDataset:
    """Thirteen documents of different lengths, one of them a single character."""
    texts = [f"{i}: " + "the cat sat on the mat, 漢 " * (i * i % 7) for i in range(12)] + ["x"]
    return grain.MapDataset.source([{"text": text, "name": f"doc{i}"} for i, text in enumerate(texts)])


@pytest.fixture
def warnings():
    """Messages logged as warnings during the test."""
    heard: list[str] = []
    handler = logger.add(lambda message: heard.append(message.record["message"]), level="WARNING")
    yield heard
    logger.remove(handler)
