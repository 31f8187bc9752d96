"""A copy of a tokenizer that never makes a special token out of text."""

import json
import secrets

import tokenizers


def plain_core(core: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer with special tokens unparsed: `</s>` in a text is four characters.

    The library's own switch is enough where special tokens are no pieces of the model, or none that merges lead to. Unigram is different:
    it takes any piece it finds in the text, and special tokens are among its pieces, with the best score of all. In the copy they have a
    name that no text contains, drawn anew each time so that nobody can write it.
    """
    core.encode_special_tokens = True
    content = json.loads(core.to_str())
    if content["model"]["type"] != "Unigram":
        return core
    specials = {token["content"]: f"{secrets.token_hex(16)}{token['content']}" for token in content["added_tokens"] if token["special"]}
    for token in content["added_tokens"]:
        token["content"] = specials.get(token["content"], token["content"])
    content["model"]["vocab"] = [[specials.get(piece, piece), score] for piece, score in content["model"]["vocab"]]
    content["post_processor"] = None  # it names them, and is not used
    copy = tokenizers.Tokenizer.from_str(json.dumps(content))
    copy.encode_special_tokens = True
    return copy
