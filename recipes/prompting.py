"""How problems become tokens for one model, and its answers text again: plain text for a base model, the chat template for a chat model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.chat import ChatFormat
from data.conversations import Conversation
from data.pipeline import Batch
from data.tasks.problems import Problem, Scores, Task, Tool, score
from data.tokenizer import Tokenizer
from train.rollout import Rollouts, ToolCalls


@dataclass(frozen=True)
class Prompting:
    """A tokenizer, and whether prompts are turns of a conversation."""

    tokenizer: Tokenizer
    form: ChatFormat | None  # None: a prompt is the beginning of a document
    stop_ids: tuple[int, ...]  # each ends an answer
    end_id: int  # of them, what an answer to imitate ends with

    @staticmethod
    def of(tokenizer: Tokenizer) -> "Prompting":
        """By the chat template where the tokenizer has one; else a prompt is the beginning of a document, and EOS ends it."""
        if tokenizer.chat_templates:
            form = ChatFormat(tokenizer)
            asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
            tokens, trained = form.encode(Conversation((asked, answered)))[0]
            return Prompting(tokenizer, form, form.stop_ids, int(tokens[trained][-1]))
        if tokenizer.eos_id is None:
            raise ValueError("this tokenizer has neither a chat template nor an EOS token: an answer could never end")
        return Prompting(tokenizer, None, (tokenizer.eos_id,), tokenizer.eos_id)

    def prompt(self, text: str) -> np.ndarray:
        """Up to where the answer begins."""
        return self.tokenizer.encode_prompt(text) if self.form is None else self.form.prompt([{"role": "user", "content": text}])

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> np.ndarray:
        """The same of messages; a model without a chat template takes a single one."""
        if self.form is not None:
            return self.form.prompt([dict(message) for message in messages])
        if len(messages) != 1:
            raise ValueError(f"this model's tokenizer has no chat template, so a prompt is one text; got {len(messages)} messages")
        return self.prompt(messages[0]["content"])

    def answer(self, text: str, tool: Tool | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of an answer to imitate, with their end; and which of them the model itself is to write: not what a tool says."""
        if tool is None:
            tokens = np.append(self.tokenizer.encode(text), self.end_id)
            return tokens.astype(np.int32), np.ones(len(tokens), bool)
        mark = tool_mark(self.tokenizer, tool)
        pieces: list[tuple[np.ndarray, bool]] = []
        first, *rest = text.split(tool.ends_call)
        pieces.append((self.tokenizer.encode(first), True))
        said = first
        for piece in rest:
            reply = tool.run(said)
            if not piece.startswith(reply):
                raise ValueError(f"a solution has {piece!r} behind its call, but the tool says {reply!r}")
            pieces += [
                (np.asarray([mark]), True),
                (self.tokenizer.encode(reply), False),
                (self.tokenizer.encode(piece[len(reply) :]), True),
            ]
            said = piece[len(reply) :]
        tokens = np.concatenate([*(piece for piece, _ in pieces), [self.end_id]]).astype(np.int32)
        return tokens, np.concatenate([*(np.full(len(piece), own) for piece, own in pieces), [True]])

    def text(self, tokens: np.ndarray) -> str:
        """Special tokens included: one in the middle of an answer is a mistake, and must look like one to a reward."""
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def tool_calls(self, tool: Tool | None) -> ToolCalls | None:
        if tool is None:
            return None

        def reply(call: np.ndarray) -> np.ndarray:
            return self.tokenizer.encode(tool.run(self.text(call)))

        return ToolCalls(tool_mark(self.tokenizer, tool), reply, tool.max_calls, tool.max_tokens)

    def judge(self, task: Task, problems: Sequence[Problem], rollouts: Rollouts) -> Scores:
        """The rewards of all answers, `rollouts.n` to each problem."""
        repeated = [problem for problem in problems for _ in range(rollouts.n)]
        return score(task, repeated, [self.text(rollouts.answer(row)) for row in range(len(rollouts))])

    def width(self, problems: Sequence[Problem], multiple: int = 4) -> int:
        """What holds every one of these prompts, rounded up."""
        return -(-max(len(self.prompt(problem.prompt)) for problem in problems) // multiple) * multiple

    def rows(self, problems: Sequence[Problem], task: Task, seq: int) -> Batch:
        """A row a problem with its solution, to imitate; loss on what the model is to write."""
        batch = Batch(*(np.zeros((len(problems), seq), kind) for kind in (np.int32, np.int32, np.int32, np.int32, np.float32)))
        for row, problem in enumerate(problems):
            if problem.solution is None:
                raise ValueError(
                    f"task {task.name!r} has no solution to imitate for {problem.prompt!r}: begin from a model that can do some"
                )
            prompt, (answer, own) = self.prompt(problem.prompt), self.answer(problem.solution, task.tool)
            whole = np.concatenate([prompt, answer])
            if (pairs := len(whole) - 1) > seq:
                raise ValueError(
                    f"{problem.prompt!r} and its solution have {len(whole)} tokens, more than a row of {seq} targets holds: "
                    "allow longer answers"
                )
            batch.tokens[row, :pairs], batch.targets[row, :pairs] = whole[:-1], whole[1:]
            batch.positions[row, :pairs], batch.segments[row, :pairs] = np.arange(pairs), 1
            batch.loss_weights[row, len(prompt) - 1 : pairs] = own
        return batch


def tool_mark(tokenizer: Tokenizer, tool: Tool) -> int:
    ids = tokenizer.encode_with_specials(tool.ends_call)
    if len(ids) != 1:
        raise ValueError(f"a call of the tool ends with {tool.ends_call!r}, which must be one token; this tokenizer makes {len(ids)} of it")
    return int(ids[0])
