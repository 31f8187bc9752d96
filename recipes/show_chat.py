"""Show conversations as a model reads them, token by token, what it is trained on in colour.

    python -m recipes.show_chat runs/sft_chat-DATE-TIME                            # the instructions made here
    python -m recipes.show_chat smollm2-135m-instruct/ --data calls.json --template chatml --row 3
    python -m recipes.show_chat model.gguf --data chats.jsonl --count 5 --html chats.html --png first.png

The first lines of any run of fine-tuning worth looking at: an answer that is grey is not learned, a question in colour should not be. A row
that cannot be learned from says why.
"""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field
from rich.console import Console
from rich.text import Text

from data.chat import CHATML, CHATML_TOKENS, ChatFormat, Example, Turns
from data.conversations import open_conversations, read_conversation
from data.tasks import instructions
from data.tokenizer import Tokenizer
from lm.hub import folder_of
from recipes.command_line import RecipeConfig, fail
from recipes.finetuning import Template
from recipes.loading import is_gguf
from train.logs import plain_messages
from train.pictures import plot_conversation

TRAINED, READ, SPECIAL = "black on orange3", "grey58", "bold"


class Config(RecipeConfig):
    """Which conversations, and as which model reads them."""

    model: Annotated[Path, tyro.conf.Positional] = Field(description="whose tokenizer: run, Hugging Face folder, GGUF file, or owner/name")
    data: str = Field(instructions.NAME, description="conversations: instructions (made here), a file or folder, hf://owner/name/split")
    split: Literal["train", "held_out"] = Field("train", description="of the source's two parts")
    row: int = Field(0, ge=0, description="the first conversation shown, from 0")
    count: int = Field(1, ge=1, description="conversations shown")
    turns: Turns = Field("together", description="all turns of the assistant in one row, or apart")
    template: Template = Field("auto", description="chat template: the model's own, the built-in chatml, or auto: its own if it has one")
    html: Path | None = Field(None, description="also write what is shown to this file, as a page")
    png: Path | None = Field(None, description="also draw the first one into this file")


def main(config: Config) -> None:
    """Show them, and write what was asked for."""
    plain_messages()
    form = ChatFormat(tokenizer_of(config.model, config.template), config.turns)
    source = open_conversations(config.data)
    documents = source.train if config.split == "train" else source.held_out
    if config.row >= len(documents):
        raise ValueError(f"--row {config.row}: the {config.split} part of {config.data} has the rows 0 to {len(documents) - 1}")
    console = Console(record=config.html is not None)
    for i in range(config.row, min(config.row + config.count, len(documents))):
        document = documents[i]
        try:
            examples = form.encode(read_conversation(document["text"]))
        except ValueError as error:
            raise ValueError(f"{document['name']}: {error}") from error
        for example in examples:
            show(console, form, document["name"], example)
        if config.png is not None and i == config.row:
            example = examples[0]
            texts = form.tokenizer.tokens_of(example.tokens)
            plot_conversation(texts, example.trained.tolist(), config.png, title=f"{document['name']}: trained on orange, only read grey")
    if config.html is not None:
        console.save_html(str(config.html))


def show(console: Console, form: ChatFormat, name: str, example: Example) -> None:
    """One example: each token in its colour, line breaks as ⏎ and as such. What is trained on stands in ⟦ ⟧ where there are no colours."""
    text = Text()
    specials = {form.tokenizer.id_of(name) for name in form.tokenizer.special_tokens}
    open_bracket = False
    for token, piece, trained in zip(example.tokens, form.tokenizer.tokens_of(example.tokens), example.trained, strict=True):
        if console.color_system is None and trained != open_bracket:
            text.append("⟦" if trained else "⟧")
            open_bracket = trained
        style = f"{SPECIAL if int(token) in specials else ''} {TRAINED if trained else READ}".strip()
        text.append(piece.replace("\n", "⏎\n"), style=style)
    count, learned = len(example.tokens), int(example.trained.sum())
    console.rule(f"{name}: {count} tokens, {learned} trained on ({learned / count:.0%})", style="dim")
    console.print(text, soft_wrap=False)


def tokenizer_of(source: Path, template: Template) -> Tokenizer:
    """The tokenizer of anything that can be loaded, its weights left alone, with the template asked for."""
    folder = source
    if not is_gguf(source) and not source.exists():
        folder = folder_of(f"{source}", None)
    if (folder / "tokenizer").is_dir():
        folder = folder / "tokenizer"
    tokenizer = Tokenizer.load(folder)
    if template == "own" or (template == "auto" and tokenizer.chat_templates):
        return tokenizer
    return tokenizer.changed(special_tokens=CHATML_TOKENS, chat_template=CHATML, eos=CHATML_TOKENS[1])


if __name__ == "__main__":
    chosen = tyro.cli(Config, description=__doc__, prog="python -m recipes.show_chat")
    try:
        main(chosen)
    except (ValueError, OSError) as error:
        fail(str(error))
