"""Write chats and repetitions over real texts, to train a retrieval head on.

    python scripts/real_chats.py TEXTS --tokenizer MODEL/tokenizer.json [--count 2000]

TEXTS is the folder ``train`` of ``real_texts.py``. Writes ``chats.jsonl`` (look-ups, copies and the
like, with answers) and ``repeats.jsonl`` (plain texts in which a passage stands twice) into it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Annotated

import typer
from texts.chats import Passages, make_chat, make_repeat
from texts.sources import PROSE
from tokenizers import Tokenizer


def length(rng: Random, shortest: int, longest: int) -> int:
    """Tokens; every doubling is equally likely."""
    return round(math.exp(rng.uniform(math.log(shortest), math.log(longest))))


def main(
    texts: Annotated[Path, typer.Argument(help="Folder of text files.")],
    tokenizer: Annotated[Path, typer.Option(help="The model's tokenizer.json.")],
    count: Annotated[int, typer.Option(help="Chats, and half as many repetitions.")] = 2000,
    shortest: Annotated[int, typer.Option(help="Tokens of the shortest.")] = 512,
    longest: Annotated[int, typer.Option(help="Tokens of the longest.")] = 7900,
    seed: int = 0,
) -> None:
    """Write chats.jsonl and repeats.jsonl beside the texts."""
    prose, others = [], []
    for path in sorted(texts.glob("*.txt")):
        (prose if re.match(rf"\d+-(?:{PROSE})", path.name) else others).append(path.read_text())
    passages = Passages(prose, others, Tokenizer.from_file(str(tokenizer)))
    sizes: Counter[int] = Counter()
    with (texts / "chats.jsonl").open("w") as file:
        for number in range(count):
            rng = Random(f"chat {seed} {number}")
            while True:
                messages = make_chat(passages, rng, length(rng, shortest, longest))
                size = sum(passages.size(message["content"]) + 5 for message in messages) + 24
                if size <= longest:
                    break
            sizes[size.bit_length()] += 1
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    with (texts / "repeats.jsonl").open("w") as file:
        for number in range(count // 2):
            rng = Random(f"repeat {seed} {number}")
            text = make_repeat(passages, rng, length(rng, shortest, longest))
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    shown = ", ".join(f"{n} below {1 << bits:,}" for bits, n in sorted(sizes.items()))
    print(f"{count} chats by tokens: {shown}; {count // 2} repetitions.")


if __name__ == "__main__":
    typer.run(main)
