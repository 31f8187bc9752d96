"""Text to token ids and back: `Tokenizer`, trained here or read from any Hugging Face `tokenizer.json` or GGUF file;
`StreamDecoder` for text that must appear while ids are still arriving.

The file format is Hugging Face's, so a tokenizer trained here opens in `transformers` and theirs open here. `encode` gives
the plain ids of a text. What a prompt begins with is `prompt_prefix`, the tokenizer's own rule; those trained here begin
with BOS, since the documents of their models do, and `tok(text)` in `transformers` does the same.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
from loguru import logger
from tokenizers import decoders, models, pre_tokenizers, trainers

from data import chat_template, tokenizer_gguf
from data.tokenizer_ends import prefix_of, put_around, without_ends
from data.tokenizer_plain import plain_core

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# Ids 0, 1, 2, ... in this order. The chat marks are here from the start, so that a model never has to grow for them.
SPECIAL_TOKENS = (BOS, EOS, PAD, "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")

OTHER_NAMES = ("unk_token", "sep_token", "cls_token", "mask_token")  # in tokenizer_config.json, beside BOS, EOS and PAD

# BPE never merges across these pieces. The family is GPT-4's (`cl100k_base` in tiktoken); three things differ:
#   - a line break takes the indentation after it, `\n        ` is one piece: Python pays one token a line for its layout;
#   - and never the punctuation before it. Letting `):\n    ` be one token packs 3 % more bytes into a token, but a prompt
#     that ends in `def f(x):` would then end in a token the model never saw at the end of a line;
#   - marks belong to their letters (\p{M}), so vowel signs do not break words.
# Digits stand in groups of at most three.
SPLIT_PATTERN = (
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"  # a word, with the space, dot or underscore before it
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+"  # punctuation, operators, emoji
    r"|\s*[\r\n][ \t]*"  # blank lines, the line break, the next line's indentation
    r"|\s+(?!\S)|\s+"  # inside a line: all spaces but the last, which goes with its word
)
# No piece of that pattern goes on past a line break into a word, so a text may be cut there and encoded in parts with the
# same result. The library needs over 100 bytes a character while it encodes; a book in one file would take gigabytes.
SAFE_CUT = re.compile(r"\n(?=\w)")
PART = 1 << 17  # characters, at least
PARTS_AT_ONCE = 8


class Tokenizer:
    """Token ids for text, byte for byte: `decode(encode(text)) == text` for tokenizers trained here.

    `bos_id`, `eos_id` and `pad_id` are `None` where the tokenizer has no such token, `chat_templates` is empty where it has
    none. `others` are further names that chat templates may read, such as `unk_token`. `prompt_prefix` are the ids it puts
    before a text: the BOS or none, whether one is named or not.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        bos: str | None,
        eos: str | None,
        pad: str | None,
        others: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        if core.truncation is not None or core.padding is not None:
            logger.warning("tokenizer.json asks for truncation or padding; both are off here, nothing is cut or filled")
            core.no_truncation()
            core.no_padding()
        self.prompt_prefix = prefix_of(core)
        self._core, self._plain_core = core, plain_core(core)
        self._names = {"bos": bos, "eos": eos, "pad": pad}
        self._others = dict(others or {})
        self.chat_templates = dict(chat_templates or {})
        self.bos_id, self.eos_id, self.pad_id = (self._id_of(role, name) for role, name in self._names.items())
        self.vocab_size = max(core.get_vocab(with_added_tokens=True).values()) + 1  # largest id + 1; ids may have holes
        self._added = frozenset(core.get_added_tokens_decoder())
        self._cuts_at_lines = core.normalizer is None and _cuts_as_here(core)
        self._byte_level = '"ByteLevel"' in json.dumps(json.loads(core.to_str())["decoder"])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909, on bytes as in GPT-2) learned from `texts`.

        The same texts in the same order give the same tokenizer, digest included.

        **Arguments:**

        - `texts`: the training documents. Read once.
        - `vocab_size`: ids wanted, specials and the 256 bytes included. A corpus with too few pairs to merge gives
            fewer, with a warning.

        **Raises:** `ValueError` if `vocab_size` cannot hold the bytes and the specials.
        """
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise ValueError(
                f"vocab_size ({vocab_size}) must be at least {smallest}: 256 bytes and "
                f"{len(SPECIAL_TOKENS)} special tokens come before the first merge"
            )
        core = tokenizers.Tokenizer(models.BPE())
        split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256, or bytes not in `texts` would be lost
            show_progress=False,
        )
        core.train_from_iterator((part for text in texts for part in _parts(text)), trainer)
        put_around(core, [BOS])  # as documents begin in training
        trained = cls(core, bos=BOS, eos=EOS, pad=PAD)
        if trained.vocab_size < vocab_size:
            logger.warning(
                "asked for a vocabulary of {}, got {}: the training text has no more pairs to merge",
                vocab_size,
                trained.vocab_size,
            )
        return trained

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The tokenizer of a folder (or of a `tokenizer.json` file), ours or any Hugging Face one, or of a GGUF file.

        BOS, EOS and PAD are those named in `tokenizer_config.json` beside it, none where it is silent or missing. A text
        begins with what the post-processor of `tokenizer.json` puts there, else with BOS where the config says
        `"add_bos_token": true`; in a GGUF file with BOS where `tokenizer.ggml.add_bos_token` says so. The chat template is
        `chat_template.jinja` beside it, or stands in that config.
        """
        if Path(path).suffix == ".gguf":
            return cls(**tokenizer_gguf.read(Path(path))._asdict())
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ValueError(
                f"no tokenizer at '{path}': expected a tokenizer.json file or a folder with one. "
                "Train one with Tokenizer.train(texts, vocab_size).save(folder)"
            )
        try:
            core = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception for everything it cannot parse
            raise ValueError(f"'{file}' is not a Hugging Face tokenizer.json: {error}") from error
        beside = file.with_name("tokenizer_config.json")
        try:
            config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        except ValueError as error:
            raise ValueError(f"'{beside}' is not JSON: {error}. Fetch it again, or remove it to go without BOS, EOS and PAD") from error
        bos, eos, pad = (_content(config.get(f"{role}_token")) for role in ("bos", "eos", "pad"))
        # Tokenizers trained here before they wrote down how a text begins are known by how they cut it.
        begins = config.get("add_bos_token") is True or (bos == BOS and _cuts_as_here(core))
        if begins and bos is not None and core.token_to_id(bos) is not None and not prefix_of(core):
            put_around(core, [bos])
        others = {name: text for name in OTHER_NAMES if (text := _content(config.get(name))) is not None}
        return cls(core, bos=bos, eos=eos, pad=pad, others=others, chat_templates=chat_template.read(file.parent, config))

    def save(self, folder: str | Path, *, model_max_length: int | None = None) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and, where there is a chat template, `chat_template.jinja`, which
        `AutoTokenizer.from_pretrained` reads.

        `model_max_length` is the context, in tokens, that `transformers` should assume; `None` leaves it unsaid.
        """
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {f"{role}_token": name for role, name in self._names.items() if name is not None}
        config |= self._others
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        chat_template.write(folder, self.chat_templates)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        # Each written beside its place and renamed, tokenizer.json last: where it is, both are whole.
        for name, content in (("tokenizer_config.json", text), ("tokenizer.json", self._core.to_str(pretty=True))):
            (folder / f".{name}").write_text(content, encoding="utf-8")
            (folder / f".{name}").replace(folder / name)

    def encode(self, text: str) -> np.ndarray:
        """The ids (int32) of plain text: nothing is added, and `<|user|>` inside it is ordinary characters, never the
        special token, so nobody can write one from outside.

        Loaded tokenizers may list added tokens that are not marked special (Qwen's `<think>`); those are parsed always.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores. Memory grows with the whole list, so give it some megabytes at a time;
        a single long text costs little with a tokenizer trained here, and 100 bytes a character with any other."""
        if self._cuts_at_lines and any(len(text) > 2 * PART for text in texts):
            return [self._encode_long(text) for text in texts]
        return [np.asarray(e.ids, np.int32) for e in _encoded(self._plain_core, texts)]

    def encode_prompt(self, text: str) -> np.ndarray:
        """The ids that a model is to go on from: `prompt_prefix` and the text, or the beginning of a document where both are
        empty. Conversations begin as their template says: they are for `encode_with_specials` alone.

        **Raises:** `ValueError` for no text where nothing is known that a document begins with.
        """
        tokens = np.concatenate([np.asarray(self.prompt_prefix, np.int32), self.encode(text)])
        if tokens.size:
            return tokens
        if self.opening_id is None:
            raise ValueError(f"{self} has neither BOS nor EOS for a document to begin with: a prompt needs some text")
        return np.asarray([self.opening_id], np.int32)

    @property
    def opening_id(self) -> int | None:
        """What stands before a document in training, so that its first token is predicted from something: what a prompt begins
        with (the last token, where those are several), else the EOS that ended the document before, as in GPT-2."""
        return self.prompt_prefix[-1] if self.prompt_prefix else self.eos_id

    def encode_with_specials(self, text: str) -> np.ndarray:
        """Like `encode`, but `<|user|>` in the text is the special token. For text we wrote ourselves (templates)."""
        return np.asarray(_encoded(self._parsing_core, [text])[0].ids, np.int32)

    def decode(self, tokens: Iterable[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """The text of `tokens`. Bytes that are not UTF-8 become U+FFFD, as a lone half of an emoji does."""
        return self._core.decode(self._checked(tokens), skip_special_tokens=skip_special_tokens)

    def tokens_of(self, tokens: Iterable[int] | np.ndarray) -> list[str]:
        """Each token as readable text, to look at a tokenization: `['def', ' main', '():']`.

        A token that is part of a character shows its bytes, as `\\xf0\\x9f`.
        """
        return [self._readable(token) for token in self._checked(tokens)]

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **extra: Any,
    ) -> str:
        """The text of a conversation, by the chat template; `encode_with_specials` makes ids of it.

        **Arguments:**

        - `messages`: `[{"role": "user", "content": "Hi"}, ...]`.
        - `tools`: JSON schemas of functions the model may call.
        - `add_generation_prompt`: end with the opening of the assistant's turn.
        - `extra`: what else the template reads, such as `enable_thinking=False`.

        **Raises:** `ValueError` where there is no template, or it refuses the messages, with its reason.
        """
        names = {f"{role}_token": name for role, name in self._names.items() if name is not None} | self._others
        return chat_template.render(
            self.chat_templates, messages, tools=tools, add_generation_prompt=add_generation_prompt, **(names | extra)
        )

    @property
    def special_tokens(self) -> dict[str, tokenizers.AddedToken]:
        """What text never becomes (`encode`) and templates do (`encode_with_specials`), by its name."""
        return {token.content: token for token in self._core.get_added_tokens_decoder().values() if token.special}

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name; `None` where there is none."""
        return self._core.token_to_id(token)

    def changed(self, *, special_tokens: Sequence[str] = (), chat_template: str | None = None, eos: str | None = None) -> Self:
        """This tokenizer with further special tokens, at the next free ids, with another chat template, with another EOS. All other ids
        stay. A chat model's EOS is by custom what ends its turn: whoever generates stops there.

        A model needs as many rows in its embedding: `lm.surgery.grow_vocab`.
        """
        core = tokenizers.Tokenizer.from_str(self._core.to_str())
        new = [name for name in special_tokens if core.token_to_id(name) is None]
        for place, name in enumerate(new):
            core.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False)])
            if (found := core.token_to_id(name)) != self.vocab_size + place:
                raise ValueError(
                    f"{name!r} would get id {found}, not {self.vocab_size + place}: the ids of this tokenizer have holes. "
                    "Add the tokens to its tokenizer.json by hand, at ids that are free"
                )
        templates = self.chat_templates if chat_template is None else {"default": chat_template}
        names = self._names if eos is None else self._names | {"eos": eos}
        return type(self)(core, **names, others=self._others, chat_templates=templates)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of the compact `tokenizer.json` text without its post-processor: equal digests, equal ids of `encode`
        for every text."""
        return hashlib.sha256(without_ends(self._core).to_str().encode()).hexdigest()

    def __repr__(self) -> str:
        ids = f"bos_id={self.bos_id}, eos_id={self.eos_id}, pad_id={self.pad_id}"
        return f"Tokenizer(vocab_size={self.vocab_size}, {ids}, digest={self.digest[:12]}…)"

    def _encode_long(self, text: str) -> np.ndarray:
        parts = list(_parts(text))
        some = (parts[i : i + PARTS_AT_ONCE] for i in range(0, len(parts), PARTS_AT_ONCE))
        return np.concatenate([np.asarray(e.ids, np.int32) for few in some for e in _encoded(self._core, few)])

    @functools.cached_property
    def _parsing_core(self) -> tokenizers.Tokenizer:
        # Its own copy: switching the one flag back and forth would race with encoding in another thread.
        return tokenizers.Tokenizer.from_str(self._core.to_str())

    def _id_of(self, role: str, name: str | None) -> int | None:
        token = None if name is None else self._core.token_to_id(name)
        if name is not None and token is None:
            logger.warning("the tokenizer has no token {!r}, named as its {}; going on without", name, role)
            self._names = self._names | {role: None}
        return token

    def _readable(self, token: int) -> str:
        piece = self._core.id_to_token(token)
        if piece is None:
            raise ValueError(f"this tokenizer has no token with id {token}: its ids have holes")
        if not self._byte_level or token in self._added:
            return piece
        return bytes(_BYTE_OF[char] for char in piece).decode("utf-8", "backslashreplace")

    def _checked(self, tokens: Iterable[int] | np.ndarray) -> list[int]:
        ids = np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens), np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:  # the library would drop them unsaid
            outside = ids[(ids < 0) | (ids >= self.vocab_size)]
            raise ValueError(f"token ids must be 0 to {self.vocab_size - 1}, got {outside[:5].tolist()}")
        return ids.tolist()


class StreamDecoder:
    """Text from ids that arrive one at a time: what `push` returns, joined, and then `flush`, is `decode` of all ids.

    A character whose bytes are spread over several tokens is held back until it is whole. (One exception: tokenizers that
    spell characters in bytes, `<0xE7>`, decode a row of bytes that is no UTF-8 to U+FFFD throughout; what was whole in it
    before it broke has then been said.)
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._decode = functools.partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
        self._said: list[int] = []  # the last whole stretch: context, since some decoders strip a leading space
        self._open: list[int] = []  # ids after it
        self._shown = 0  # characters of decode(said + open) already returned

    def push(self, token: int) -> str:
        """The text that became certain with `token`; often none."""
        self._open.append(token)
        text = self._decode(self._said + self._open)
        certain = len(text.rstrip("\ufffd"))  # U+FFFD at the end may yet become a character, several of them may become one
        whole = certain == len(text)
        new = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        if whole and new:
            self._said, self._open = self._open, []
            self._shown = len(self._decode(self._said))
        return new

    def flush(self) -> str:
        """The rest: U+FFFD for a character that never became whole. The decoder is then new again."""
        rest = self._decode(self._said + self._open)[self._shown :]
        self._said, self._open, self._shown = [], [], 0
        return rest


def _encoded(core: tokenizers.Tokenizer, texts: Sequence[str]) -> list[tokenizers.Encoding]:
    try:
        return core.encode_batch_fast(list(texts), add_special_tokens=False)
    except TypeError:
        for i, text in enumerate(texts):  # "TextInputSequence must be str" is what it says of "\ud800", too
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"text {i} of {len(texts)} has half a surrogate pair ({text[error.start]!r}) at character "
                    f"{error.start}, which UTF-8 cannot hold; clean it with text.encode('utf-8', 'replace').decode()"
                ) from error
        raise


def _parts(text: str) -> Iterator[str]:
    """`text` in parts of about `PART` characters that encode as they do together; whole where it has no line to cut at."""
    start = 0
    while (cut := SAFE_CUT.search(text, start + PART)) is not None:
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def _cuts_as_here(core: tokenizers.Tokenizer) -> bool:
    return json.dumps(SPLIT_PATTERN) in core.to_str()


def _content(token: str | dict[str, Any] | None) -> str | None:
    """The text of an entry in tokenizer_config.json: a string, or an object with `content`."""
    return token["content"] if isinstance(token, dict) else token


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the bytes: printable Latin-1 is itself, the rest count up from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
