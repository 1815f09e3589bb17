"""Tokenizers and files for tests of training data."""

import json
from random import Random

from specontext_vllm.distillation.text_files import Files

WORDS = [f"w{i}" for i in range(3000)]


def make_words(bos=True, eos="</s>", chat_template=None, longest=100_000):
    """A tokenizer that makes one token of each of ``WORDS``, so that an id says which word of a
    document it was; ``bos``: it adds one to plain text.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.WordLevel(
            {word: i for i, word in enumerate([*WORDS, "<s>", "</s>", "<unk>"])}, unk_token="<unk>"
        )
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", len(WORDS))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token=eos,
        unk_token="<unk>",
        chat_template=chat_template,
        model_max_length=longest,
    )


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.texts = tokenizer, []

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, **options):
        self.texts.append(text)
        return self.tokenizer(text, **options)


def files(folder, tokenizer, *paths):
    return Files(list(paths), tokenizer, folder / "tokens")


def text_of(documents, tokenizer, seed, count=100_000, held_out=False):
    return tokenizer.decode(
        documents.draw(Random(seed), count, held_out)[0], skip_special_tokens=True
    )


def write(folder, name, *records):
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
