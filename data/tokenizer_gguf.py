"""The tokenizer and chat templates that a GGUF file carries in its metadata.

llama.cpp keeps tokens, their types, and merges or scores; how text is cut before the merges it keeps as a name (`tokenizer.ggml.pre`)
that stands for code. `PRE_TOKENIZERS` has the names whose code is known here; others are refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from data.tokenizer_ends import put_around

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
SPACE = "▁"  # how SentencePiece writes one


class Parts(NamedTuple):
    """What `data.tokenizer.Tokenizer` is made of."""

    core: tokenizers.Tokenizer
    bos: str | None
    eos: str | None
    pad: str | None
    others: dict[str, str]
    chat_templates: dict[str, str]


class Cut(NamedTuple):
    """How text is cut into the pieces that merges never cross."""

    patterns: tuple[str, ...] = ()  # one after the other, each inside the pieces of those before; none: GPT-2's
    digits: bool = False  # every digit stands alone
    nfc: bool = False  # text is normalised first, as by the published tokenizer.json; llama.cpp itself does not
    whole_words: bool = False  # a piece that is a token needs no merges (`ignore_merges`)


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

PRE_TOKENIZERS: dict[str, Cut] = {
    "gpt-2": Cut(),
    "smollm": Cut(digits=True),
    "starcoder": Cut(digits=True),
    "refact": Cut(digits=True),
    "llama-bpe": Cut((_WORDS % r"\p{N}{1,3}",), whole_words=True),
    "qwen2": Cut((_WORDS % r"\p{N}",), nfc=True),
    "deepseek-r1-qwen": Cut((_WORDS % r"\p{N}",), nfc=True),
    # llama.cpp's own, for models whose cut its converter did not know.
    "default": Cut(
        (
            r"[\p{P}\$\+<=>\^~\|]+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+",
            r"[0-9][0-9][0-9]",
        )
    ),
}


def read(path: Path) -> Parts:
    """The tokenizer of a GGUF file.

    **Raises:** `ValueError` for what is no whole GGUF file or has no tokenizer, for kinds of tokenizer and of cut we do not know, and
    without the extra `gguf`.
    """
    return from_metadata(_metadata(path), str(path))


def from_metadata(metadata: Mapping[str, Any], where: str) -> Parts:
    """The tokenizer from metadata by their names; `where` is for messages."""
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if kind is None or not tokens:
        raise ValueError(f"'{where}' has no tokenizer: expected tokenizer.ggml.model and tokenizer.ggml.tokens in its metadata")
    makers = {"gpt2": _byte_level, "llama": _sentence_piece}
    if kind not in makers:
        raise ValueError(f"'{where}' has a tokenizer of kind {kind!r}; known are {', '.join(makers)}. Take the model's own tokenizer.json")
    if len(set(tokens)) < len(tokens):
        twice = sorted({token for token in tokens if tokens.count(token) > 1})
        raise ValueError(f"'{where}' has tokens with two ids: {twice[:5]}")
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    core = makers[kind](metadata, tokens, types, where)
    for name, is_special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [AddedToken(t, normalized=False, special=is_special) for t, kind_of in zip(tokens, types, strict=True) if kind_of == name]
        core.add_special_tokens(added) if is_special else core.add_tokens(added)

    ids = {role: metadata.get(f"tokenizer.ggml.{key}_token_id") for role, key in _ROLES.items()}
    names = {role: None if i is None else tokens[i] for role, i in ids.items()}
    _add_ends(core, metadata, names)
    others = {} if names["unk"] is None else {"unk_token": names["unk"]}
    return Parts(core, names["bos"], names["eos"], names["pad"], others, _templates(metadata))


_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def _metadata(path: Path) -> dict[str, Any]:
    try:
        import gguf  # an extra: most who load tokenizers never meet such a file
    except ModuleNotFoundError as error:
        raise ValueError(f"reading '{path}' needs the gguf package, which is not installed: run `uv sync --extra gguf`") from error
    if not path.is_file():
        raise ValueError(f"no tokenizer at '{path}': expected a GGUF file")
    try:
        fields = gguf.GGUFReader(path).fields
        return {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}
    except (ValueError, IndexError, KeyError) as error:  # all of them mean that bytes are missing or are others
        raise ValueError(f"'{path}' is not a whole GGUF file ({error}): was the download or copy cut short?") from error


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int], where: str) -> tokenizers.Tokenizer:
    """BPE on bytes, as of GPT-2 on."""
    name = metadata.get("tokenizer.ggml.pre")
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            f"'{where}' cuts text by tokenizer.ggml.pre = {name!r}; known are {', '.join(PRE_TOKENIZERS)}. "
            "Any other cut would give other ids: take the model's own tokenizer.json"
        )
    cut = PRE_TOKENIZERS[name]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", ())]
    core = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=cut.whole_words))
    if cut.nfc:
        core.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in cut.patterns]
    steps += [pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not cut.patterns)]
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    core.decoder = decoders.ByteLevel()
    return core


def _sentence_piece(metadata: Mapping[str, Any], tokens: list[str], types: list[int], where: str) -> tokenizers.Tokenizer:
    """SentencePiece's BPE, as of Llama 1 and 2, Mistral and Gemma: the two neighbours are merged whose union has the best score, and
    characters that are no token become their bytes. A merge is therefore a token cut in two at any place where both halves are tokens,
    and comes before those of lower score."""
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise ValueError(f"'{where}' has no tokenizer.ggml.scores, one for each token: without them no merge has its place")
    ids = {token: i for i, token in enumerate(tokens)}
    halves = [
        (-scores[i], ids[token[:at]], ids[token[at:]])
        for token, i in ids.items()
        if types[i] == NORMAL
        for at in range(1, len(token))
        if token[:at] in ids and token[at:] in ids
    ]
    merges = [(tokens[left], tokens[right]) for _, left, right in sorted(halves)]
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    core = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in types))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    core.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return core


def _add_ends(core: tokenizers.Tokenizer, metadata: Mapping[str, Any], names: Mapping[str, str | None]) -> None:
    """BOS and EOS around a text, as llama.cpp would put them."""
    # Where nothing is said, llama.cpp begins texts of SentencePiece and of Llama 3 with BOS and no others (llama-vocab.cpp).
    by_kind = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    bos = names["bos"] if metadata.get("tokenizer.ggml.add_bos_token", by_kind) else None
    eos = names["eos"] if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    put_around(core, [] if bos is None else [bos], [] if eos is None else [eos])


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    key = "tokenizer.chat_template"
    found = {name.removeprefix(f"{key}."): text for name, text in metadata.items() if name.startswith(f"{key}.")}
    return ({"default": metadata[key]} if key in metadata else {}) | found
