"""Questions about a long real text, asked through the model's chat template."""

from __future__ import annotations

from random import Random

from benchmarks.real.prompts import Group, Prompt, PromptError, Writer

CHAT = "chat"
ABOUT = "an answer to a question about a real text, through the model's chat template"
LEAST_TEXT = 64
QUESTIONS = (
    "Summarize the text above in a few paragraphs.",
    "Who or what does the text above speak of, and what does it say of each of them?",
    "What are the main points of the text above? Give a numbered list with a sentence on each.",
    "Explain the text above to somebody who knows nothing of the subject.",
    "What does the text above say at its beginning, in its middle and at its end?",
    "Write a letter to a friend in which you tell what the text above says.",
    "Quote the most important sentences of the text above, and explain each of them.",
    "Write five questions on the text above, each with its answer.",
)
"""They fit novels and manuals alike, and want answers that are not over after a few words."""


def chat_group(writer: Writer, context: int, prompts: int, answer: int, seed: int) -> Group:
    """Prompts that have, with an answer of ``answer`` tokens, at most ``context`` tokens; the same
    ones for the same arguments.

    Raises:
        PromptError: ``context`` has no room for a text.
        TextError: no text is that long.
    """
    asked = [
        _chat(writer, Random(f"{seed} {CHAT} {context} {number}"), context, answer, number)
        for number in range(prompts)
    ]
    return Group(CHAT, context, asked)


def _chat(writer: Writer, rng: Random, context: int, answer: int, number: int) -> Prompt:
    question = QUESTIONS[number % len(QUESTIONS)]

    def tokens_of(text: str) -> list[int]:
        return writer.question(f"{text}\n\n{question}", "")

    room = context - answer
    length = room - len(tokens_of(""))
    if length < LEAST_TEXT:
        raise PromptError(
            f"--contexts: found {context}, too few tokens for chat with an answer of {answer}; "
            "use a longer one or fewer --answer-tokens."
        )
    passage = writer.passage(rng, length)
    while True:
        # A text cut out of another one may have other tokens at its ends.
        tokens = tokens_of(writer.tokenizer.decode(passage, skip_special_tokens=True))
        if len(tokens) <= room:
            return Prompt(tokens)
        passage = passage[: room - len(tokens)]
