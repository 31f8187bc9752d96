"""The model type `zmaj` of EleutherAI's lm-eval: its three questions, answered by our models.

Importing this module needs lm-eval, and registers the type; nothing else here imports it at its top. What lm-eval's own `hf` type does with
text is done here too, so that the same weights get the same numbers:

- special tokens written in a text are those tokens, and what the tokenizer puts before a text by itself is put there, once;
- an empty context, and the first token of a rolling text, are predicted from BOS, else EOS;
- white space at the end of a context goes to the continuation;
- what is longer than the context loses its beginning. Here that is counted, and said.
"""

from collections.abc import Sequence
from typing import Any

import jax.random as jr
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from loguru import logger

import lm
from data.requests import Request, RequestPlan
from data.tokenizer import Tokenizer
from lm.base import AbstractLM
from lm.sampling import GREEDY, Sampler
from recipes.completions import complete
from recipes.evaluate_model import run_with
from recipes.loading import load
from train.evaluate import Likelihood, Scorer, Speed
from train.logs import progress
from train.runtime import choose_device, device_facts

SAMPLING = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}


@register_model("zmaj")
class ZmajLM(TemplateLM):
    """A run, folder, GGUF file or repository, asked by lm-eval."""

    def __init__(
        self,
        pretrained: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        backend: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        batch_tokens: int = 4096,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
    ) -> None:
        """**Arguments:**

        - `pretrained`, `revision`: as in `recipes.loading.load`.
        - `batch_size`: answers written at a time; `None` or "auto": 16. `max_batch_size` is lm-eval's and means nothing here.
        - `batch_tokens`: places computed at a time when reading.
        - `max_length`: context in tokens; `None`: the model's.
        - `max_gen_toks`: of an answer, where the task does not say.
        - `seed`: of tasks that sample.
        """
        super().__init__()
        facts = device_facts(choose_device(device or "auto"))  # type: ignore[arg-type]
        self.model, self.our_tokenizer, self.origin = self._loaded(pretrained, revision)
        self.ops, self.flight = run_with(self.model, facts, dtype, backend)
        self.scorer, self.speed = Scorer(self.model, self.flight, self.ops), Speed()
        self.writer = lm.cast(self.model, self.flight.dtype)
        self.rows = 16 if batch_size in (None, "auto") else int(batch_size)
        self.batch_tokens, self.max_gen_toks, self.seed = int(batch_tokens), int(max_gen_toks), seed
        self.max_length = min(int(max_length or self.model.config.context), self.model.config.context)

    @staticmethod
    def _loaded(pretrained: str, revision: str | None) -> tuple[AbstractLM, Tokenizer, str]:
        return load(pretrained, revision=revision)

    # ------------------------------------------------------------------------------------------- text and ids

    @property
    def eot_token_id(self) -> int:
        if self.our_tokenizer.eos_id is None:
            raise ValueError(f"{self.our_tokenizer} has no EOS token, which lm-eval ends texts with: name one in its tokenizer_config.json")
        return self.our_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.our_tokenizer.opening_id is None else self.our_tokenizer.opening_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = self.our_tokenizer.encode_with_specials(string).tolist()
        prefix = list(self.our_tokenizer.prompt_prefix)
        there = add_special_tokens is None and ids[: len(prefix)] == prefix  # a template has written it already
        return ids if add_special_tokens is False or there else prefix + ids

    @property
    def tokenizer_name(self) -> str:
        return self.our_tokenizer.digest[:16]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if chat_template is False or chat_template is None:
            return None
        name = chat_template if isinstance(chat_template, str) else "default"
        if name not in self.our_tokenizer.chat_templates:
            there = ", ".join(self.our_tokenizer.chat_templates) or "none"
            raise ValueError(f"this tokenizer has no chat template {name!r}; it has {there}")
        return self.our_tokenizer.chat_templates[name]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without a generation prompt it ends where its last message does, to be gone on with."""
        text = self.our_tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].rstrip()
        return text[: text.rindex(last) + len(last)]

    # ------------------------------------------------------------------------------------------- the three questions

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        asked = [self._request(context, continuation) for _, context, continuation in requests]
        cut = sum(len(c) + len(t) > self.max_length + 1 for _, c, t in requests)
        if cut:
            logger.warning(f"{cut:,} of {len(requests):,} requests are longer than {self.max_length} tokens and lose their beginning")
        plan = RequestPlan(asked, batch_tokens=self.batch_tokens)
        found: dict[int, Likelihood] = {}
        with progress("log-likelihoods", len(plan)) as told:
            for i in range(len(plan)):
                for number, likelihood in self.scorer(plan[i], self.speed).items():
                    found[number] = likelihood
                    if requests[number][0] is not None:  # a window of a rolling text is no request of its own
                        answer = likelihood.log_likelihood, likelihood.greedy
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                told(i + 1)
        return [(found[i].log_likelihood, found[i].greedy) for i in range(len(asked))]

    def _request(self, context: list[int], continuation: list[int]) -> Request:
        if not 0 < len(continuation) <= self.max_length:
            raise ValueError(f"a continuation has {len(continuation)} tokens: expected 1 to {self.max_length}, the context of this model")
        whole = np.asarray([*context, *continuation][-(self.max_length + 1) :], np.int32)
        return Request(whole[: len(whole) - len(continuation)], whole[len(whole) - len(continuation) :])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Each text in windows as long as the context that share one token; the last one reaches back as far as it can."""
        windows: list[tuple[None, list[int], list[int]]] = []
        text_of: list[int] = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            cut = get_rolling_token_windows(tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
            pairs = [make_disjoint_window(pair) for pair in cut]
            windows += [(None, context, targets) for context, targets in pairs]
            text_of += [i] * len(pairs)
        totals = [0.0] * len(requests)
        for i, (log_likelihood, _) in zip(text_of, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop string or EOS, neither shown; those with the same settings and like lengths together."""
        ids = [self.tok_encode(request.args[0]) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (repr(requests[i].args[1]), len(ids[i]), i))
        answers: list[str] = [""] * len(requests)
        with progress("answers", len(requests)) as told:
            at = 0
            while at < len(order):
                settings = requests[order[at]].args[1]
                together = [i for i in order[at : at + self.rows] if requests[i].args[1] == settings]
                for i, text in zip(together, self._written([ids[i] for i in together], settings, at), strict=True):
                    answers[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                at += len(together)
                told(at)
        return answers

    def _written(self, prompts: Sequence[list[int]], settings: dict[str, Any], number: int) -> list[str]:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        most, samples = kwargs.pop("max_gen_toks"), kwargs.pop("do_sample")
        end = self.our_tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        stops = handle_stop_sequences(kwargs.pop("until", None), eos=end)
        if strange := sorted(kwargs.keys() - SAMPLING):
            raise ValueError(f"generation_kwargs has {', '.join(strange)}: known are until, max_gen_toks, do_sample, {', '.join(SAMPLING)}")
        room = self.max_length - most
        if room < 1:
            raise ValueError(f"max_gen_toks ({most}) leaves no place for a prompt in a context of {self.max_length} tokens")
        if cut := sum(len(prompt) > room for prompt in prompts):
            logger.warning(f"{cut} of {len(prompts)} prompts are longer than {room} tokens and lose their beginning")
        sampler, key = (Sampler(**kwargs), jr.fold_in(jr.key(self.seed), number)) if samples else (GREEDY, None)
        kept = [np.asarray(prompt[-room:], np.int32) for prompt in prompts]
        written = complete(self.writer, kept, self.our_tokenizer, max_new_tokens=most, stops=stops, sampler=sampler, key=key, ops=self.ops)
        return [each.text for each in written]
