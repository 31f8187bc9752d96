"""A task's words as a model's ids: what a text begins with, prompts with or without a chat template, requests."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.requests import Request, encode_pair, with_spaces_moved
from data.tasks.multiple_choice import Wording
from data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Words:
    """How texts become requests."""

    tokenizer: Tokenizer
    opening: str | None = None  # a token put before every text instead of the tokenizer's own
    chat: bool = False
    system: str | None = None

    @property
    def prefix(self) -> np.ndarray:
        """Before every text without a template: what the tokenizer puts there by itself."""
        return np.asarray(self.tokenizer.prompt_prefix if self.opening is None else [self._named(self.opening)], np.int32)

    @property
    def start(self) -> np.ndarray:
        """The context of a text that has none, never empty: what texts begin with, else what documents are predicted from in training."""
        if len(self.prefix):
            return self.prefix
        if self.tokenizer.opening_id is None:
            raise ValueError(
                f"{self.tokenizer} has neither BOS nor EOS, so nothing is known from which the first token of a text is predicted: name "
                "one in the tokenizer_config.json, or with --opening"
            )
        return np.asarray([self.tokenizer.opening_id], np.int32)

    def described(self) -> dict[str, object]:
        """For the record: what texts begin with, as tokens."""
        tokens = self.tokenizer.tokens_of
        return {"texts_begin_with": tokens(self.prefix), "empty_contexts_begin_with": tokens(self.start), "chat_template": self.chat}

    def prompt(self, wording: Wording, query: str, examples: Sequence[tuple[str, str]]) -> str:
        """What a question is put in, as text."""
        if not self.chat:
            return wording.context(query, examples)
        return self.tokenizer.render_chat(wording.messages(query, examples, self.system), add_generation_prompt=True)

    def prompt_ids(self, prompt: str) -> np.ndarray:
        """Of a prompt that will be gone on with. White space at its end is left away: it belongs to the token that comes."""
        if self.chat:
            return self.tokenizer.encode_with_specials(prompt)
        ids = np.concatenate([self.prefix, self.tokenizer.encode(prompt.rstrip())])
        return ids if len(ids) else self.start

    def request(self, prompt: str, continuation: str) -> Request:
        """log p(continuation | prompt)."""
        if self.chat:  # a template ends where the answer is to begin, line break and all
            return Request(*encode_pair(self.tokenizer.encode_with_specials, prompt, continuation))
        context, ids = encode_pair(self.tokenizer.encode, *with_spaces_moved(prompt, continuation))
        context = np.concatenate([self.prefix, context])
        return Request(context if len(context) else self.start, ids)

    def whole(self, texts: Sequence[str]) -> list[Request]:
        """log p(text) of each, with nothing before it. Never in a template."""
        return [Request(self.start, ids) for ids in self.tokenizer.encode_batch(texts)]

    def _named(self, token: str) -> int:
        found = self.tokenizer.id_of(token)
        if found is None:
            raise ValueError(f"--opening {token!r} is no token of this model's tokenizer: expected one such as '<|endoftext|>'")
        return found


def check_ids(tokens: Sequence[np.ndarray], vocab: int) -> None:
    """**Raises:** `ValueError` where a token is not in the model's vocabulary."""
    highest = max((int(each.max()) for each in tokens if len(each)), default=0)
    if highest >= vocab:
        raise ValueError(f"the tokenizer gives ids up to {highest}, the model's vocabulary has {vocab}: is it this model's tokenizer?")
