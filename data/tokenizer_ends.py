"""What a tokenizer puts before and after a text by its own rule, its post-processor.

`Tokenizer.encode` adds nothing; the rule says how a prompt begins. Naming a BOS is no such rule: SmolLM2-Instruct names `<|im_start|>`,
which it puts before no text.
"""

from collections.abc import Sequence

import tokenizers
from tokenizers import processors


def put_around(core: tokenizers.Tokenizer, before: Sequence[str], after: Sequence[str] = ()) -> None:
    """Make `before $A after`, of special tokens by name, the rule. Where both are empty the rule stays what it was."""
    names = dict.fromkeys([*before, *after])
    if names:
        core.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=[(name, core.token_to_id(name)) for name in names]
        )


def prefix_of(core: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The ids that the rule puts before a text."""
    probe = core.encode("a")
    read = [at for at, is_read in enumerate(probe.attention_mask) if is_read]  # all but padding
    first = next((n for n, at in enumerate(read) if not probe.special_tokens_mask[at]), 0)
    return tuple(probe.ids[at] for at in read[:first])


def without_ends(core: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer without a rule: what decides the ids of `encode`."""
    if core.post_processor is None:
        return core
    copy = tokenizers.Tokenizer.from_str(core.to_str())
    copy.post_processor = None
    return copy
