"""With whom `recipes.chat` talks, and how."""

import json
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import Field, model_validator

from recipes.command_line import resumable
from recipes.conversation import Draw
from recipes.generating import DrawConfig

CONTEXT = 4096  # tokens, where the model takes more and none are asked for: what is not used takes memory all the same


class Config(DrawConfig):
    """With whom to talk, and how."""

    model: Annotated[Path, tyro.conf.Positional] = Field(description="run, Hugging Face folder, GGUF file, or owner/name on the Hub")
    system: str | None = Field(None, description="system prompt; None: the template's own, if it has one")
    max_new_tokens: int = Field(512, ge=1, description="tokens of a reply at most")
    context: int | None = Field(None, ge=16, description="tokens of a conversation at most; None: what the model takes, up to 4,096")
    template: dict[str, str] = Field(
        {}, description="further names that the chat template reads, as in enable_thinking false (JSON, or text)"
    )
    prompts: Path | None = Field(None, description="JSON Lines to answer instead of talking: a prompt, or messages, a line")
    out: Path | None = Field(None, description="where the answers to --prompts go, a line each")
    batch: int = resumable(16, ge=1, description="prompts answered together")

    @model_validator(mode="after")
    def _belong_together(self) -> "Config":
        if (self.prompts is None) != (self.out is None):
            raise ValueError("--prompts and --out belong together: a file of prompts, and one for the answers")
        return self

    def draw(self) -> Draw:
        return Draw(self.sampler(), self.max_new_tokens, self.stop, self.seed)

    def template_names(self) -> dict[str, Any]:
        return {name: _value(text) for name, text in self.template.items()}

    def context_of(self, most: int) -> int:
        """How many tokens a conversation may have with a model made for `most`.

        **Raises:** `ValueError` where more were asked for.
        """
        if self.context is not None and self.context > most:
            raise ValueError(f"--context {self.context} is more than the {most} tokens that this model was made for")
        return self.context or min(most, CONTEXT)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
