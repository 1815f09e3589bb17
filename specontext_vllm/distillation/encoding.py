"""Texts and chat turns as tokens, and which of them answer what was asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Tokens = tuple[np.ndarray, np.ndarray]
"""Ids ``[N]`` int32, and whether each token answers something asked before, ``[N]`` bool."""


def encode(stretches: Sequence[tuple[str, bool]], tokenizer: Any, *, plain: bool) -> Tokens:
    """Tokens of a document, ended by the tokenizer's end-of-text token if it has one.

    Args:
        stretches: text, and whether it answers what was asked.
        plain: whether the tokenizer adds what it puts around plain text, such as a bos token; chat
            templates write it themselves.
    """
    text = "".join(part for part, _ in stretches)
    encoded = tokenizer(text, add_special_tokens=plain, return_offsets_mapping=True, verbose=False)
    ids = encoded["input_ids"]
    ends = np.cumsum([len(part) for part, _ in stretches])
    # The tokenizer gives tokens that it adds after the text an offset of 0.
    first = np.maximum.accumulate(
        np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 0]
    )
    stretch = np.searchsorted(ends[:-1], first, side="right")
    answers = np.array([answer for _, answer in stretches])[stretch]
    end = tokenizer.eos_token_id
    if end is not None and (not ids or ids[-1] != end):
        ids, answers = [*ids, end], np.append(answers, False)
    return np.array(ids, dtype=np.int32), answers


def encode_turns(turns: Sequence[tuple[str, str]], tokenizer: Any) -> Tokens:
    """Tokens of chat turns (role, text); see ``as_text``."""
    return encode(
        as_text(turns, tokenizer),
        tokenizer,
        plain=getattr(tokenizer, "chat_template", None) is None,
    )


def as_text(turns: Sequence[tuple[str, str]], tokenizer: Any) -> list[tuple[str, bool]]:
    """Chat turns (role, text) in the tokenizer's chat format, or as plain text if it has none; the
    assistant's turns are answers.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return [
            (f"\n\n{text}" if i else text, role == "assistant")
            for i, (role, text) in enumerate(turns)
        ]
    whole = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns], tokenize=False
    )
    # Templates trim each turn's text and wrap it in markers, so it is searched for after the end of
    # the turn before.
    stretches: list[tuple[str, bool]] = []
    done = at = 0
    for role, text in turns:
        first = whole.find(text.strip(), at)
        if first < 0:
            continue
        at = first + len(text.strip())
        if role == "assistant":
            if tokenizer.eos_token and whole.startswith(tokenizer.eos_token, at):
                at += len(tokenizer.eos_token)
            stretches += [(whole[done:first], False), (whole[first:at], True)]
            done = at
    return [*stretches, (whole[done:], False)]
