"""What is asked: prompts as tokens, and what turns text into them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from random import Random
from typing import Any, Literal

from benchmarks.real.texts import Texts

Kind = Literal["log-prob", "right", "share", "long"]


@dataclass(frozen=True)
class Prompt:
    """One prompt, and what is asked of the decode steps behind it.

    Attributes:
        tokens: ids of the prompt.
        forced: replies that are emitted by force, one request each; none: the reply is free.
        reply_tokens: limit of a free reply.
        answers: what a free reply is compared with.
        unscored: decode steps of a forced reply, from the first on, that do not count.
    """

    tokens: list[int]
    forced: list[list[int]] = field(default_factory=list)
    reply_tokens: int = 0
    answers: list[str] = field(default_factory=list)
    unscored: int = 0

    @property
    def reply_room(self) -> int:
        """Tokens of the longest reply there may be."""
        return max([self.reply_tokens, *map(len, self.forced)])


@dataclass(frozen=True)
class Task:
    """A kind of prompt.

    Attributes:
        kind: "log-prob" (natural logarithm, a token), "right" (0 or 1), "share" (0 to 1), or "long"
            (free generation).
        make: (writer, random numbers, context, number of the prompt) -> prompt that has, with its
            reply, at most ``context`` tokens.
        score: (prompt, replies) -> score. A reply is a text, or the log-probabilities of forced
            tokens, the first left out.
        about: one line for the notes under the tables.
        floor: where dense attention scores less, the task says nothing about a retriever.
        count: prompts there are; None for as many as one likes.
    """

    name: str
    kind: Kind
    make: Callable[[Writer, Random, int, int], Prompt]
    score: Callable[[Prompt, list[Any]], float]
    about: str
    floor: float = 0.3
    count: int | None = None

    def says_nothing(self, dense_scores: list[float]) -> bool:
        """Whether the model cannot do the task even with all of its context."""
        return (
            self.kind in ("right", "share") and sum(dense_scores) / len(dense_scores) < self.floor
        )


@dataclass(frozen=True)
class Group:
    """Prompts of one task and context, which are prefilled once for all settings."""

    task: str
    context: int
    prompts: list[Prompt]

    @cached_property
    def digest(self) -> str:
        """Of everything that is asked."""
        content = json.dumps([asdict(prompt) for prompt in self.prompts])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class PromptError(ValueError):
    """A prompt that cannot be made; the message is one sentence."""


@dataclass(frozen=True)
class Writer:
    """Turns texts into a model's tokens.

    Attributes:
        tokenizer: the model's.
        forced_tokens: of a forced passage; the first is prefill's and does not count.
        long_tokens: that a long generation emits.
        sizes: of the last prompts of a task that fitted, by task and tokens.
    """

    tokenizer: Any
    texts: Texts
    forced_tokens: int = 128
    long_tokens: int = 2048
    sizes: dict[tuple[str, int], int] = field(default_factory=dict)

    def encode(self, text: str) -> list[int]:
        """Token ids of bare text."""
        return self.texts.encode(text)

    @property
    def begin(self) -> list[int]:
        """The token that texts begin with, for models that want one."""
        first = list(self.tokenizer("a")["input_ids"])[:1]
        return first if first == [self.tokenizer.bos_token_id] else []

    def passage(self, rng: Random, tokens: int) -> list[int]:
        """A passage of real text of so many tokens, the beginning token included."""
        return self.begin + self.texts.passage(rng, tokens - len(self.begin))

    def question(self, content: str, prefix: str) -> list[int]:
        """Token ids of a user's message, with the answer begun: the prefix follows the header of
        the assistant's turn, or the message where there is no chat template.
        """
        if getattr(self.tokenizer, "chat_template", None) is None:
            return list(self.tokenizer(f"{content} {prefix}".rstrip())["input_ids"])
        messages = [{"role": "user", "content": content}]
        opened = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return [*opened, *self.encode(prefix)]
