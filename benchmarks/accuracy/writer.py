"""Turns questions into a model's tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from specontext_vllm.synthetic import tasks as demo


class PromptError(ValueError):
    """A prompt that cannot be made; the message is one sentence."""


@dataclass(frozen=True)
class Draft:
    """One question before it is tokens.

    Attributes:
        messages: chat messages; the last is the user's.
        answers: what the metric compares the reply with.
        reply: a right reply, which sets the limit of the model's own; for perplexity the text that
            is forced.
    """

    messages: list[dict[str, str]]
    answers: tuple[str, ...]
    reply: str


@dataclass(frozen=True)
class Example:
    """One prompt as token ids, and what is asked of the reply.

    Attributes:
        prompt: token ids. answers: see ``Draft``.
        reply_tokens: limit of the reply.
        forced: token ids that the decode steps are made to emit, for perplexity.
    """

    prompt: list[int]
    answers: tuple[str, ...]
    reply_tokens: int
    forced: list[int] | None = None


class Writer:
    """Turns messages into a model's tokens, with its chat template if it has one; else the texts
    follow each other.
    """

    SLACK_TOKENS = 16
    """Tokens a reply may have beyond a tenth more than the right one's."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        words = " ".join(demo.sentence(Random(0)) for _ in range(64))
        self._per_piece = len(self.encode(words)) / len(demo.pieces(words))

    def encode(self, text: str) -> list[int]:
        """Token ids of bare text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, text: str) -> list[int]:
        """Token ids of a text that the model is to go on with, without a chat's markers."""
        return list(self.tokenizer(text)["input_ids"])

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation that the model is to answer."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            return self.text("\n\n".join(m["content"] for m in messages) + "\nAnswer:")
        return list(
            self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
        )

    def fit(self, draft: Callable[[int], Draft], context: int, *, force: bool = False) -> Example:
        """The draft whose prompt has ``context`` tokens, or at most three percent less, nearly
        always; never more.

        Args:
            draft: size in pieces of the demo's grammar -> draft. The same size gives the same
                draft.
            force: whether the reply is forced.

        Raises:
            PromptError: what must be in the prompt takes more.
        """
        size = int(context / self._per_piece)
        best: tuple[list[int], Draft] | None = None
        for _ in range(8):
            made = draft(size)
            prompt = self.prompt(made.messages)
            if len(prompt) <= context and (best is None or len(prompt) > len(best[0])):
                best = prompt, made
            if best is not None and len(best[0]) >= 0.97 * context:
                break
            size += int((0.985 * context - len(prompt)) / self._per_piece)
        if best is None:
            raise PromptError(
                f"--contexts: found {context}, too few tokens for this task; use a longer one."
            )
        prompt, made = best
        reply = self.encode(made.reply)
        return Example(
            prompt,
            made.answers,
            len(reply) + len(reply) // 10 + self.SLACK_TOKENS,
            reply if force else None,
        )
