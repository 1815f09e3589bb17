"""The demo model's tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path

from specontext_vllm.synthetic import tasks
from specontext_vllm.synthetic.vocabulary import vocabulary

CHAT_TEMPLATE = (
    "{{ '"
    + tasks.BOS
    + "' }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '"
    + tasks.ASSISTANT
    + "' + m['content'] + '"
    + tasks.END
    + "' }}{% else %}{{ '"
    + tasks.USER
    + "' + m['content'] + '"
    + tasks.END
    + "' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '"
    + tasks.ASSISTANT
    + "' }}{% endif %}"
)


def train_tokenizer(out: Path) -> tuple[dict[str, int], int]:
    """Train a byte-level BPE tokenizer that makes every piece of a made-up text one token, and save
    it for transformers in ``out``.

    A piece is a word with its leading space, a digit, a punctuation mark, a newline or a chat
    marker (synthetic/tasks.py): the number of a text's pieces is its length in tokens.

    Returns:
        The id of each piece, and the vocabulary size, rounded up to a multiple of 64.

    Raises:
        RuntimeError: a piece is more than one token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    known = vocabulary()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tasks.PIECE_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=tasks.SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator(known, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tasks.BOS} $A", special_tokens=[(tasks.BOS, tokenizer.token_to_id(tasks.BOS))]
    )
    ids = {}
    for piece in [*known, *tasks.SPECIALS]:
        encoded = tokenizer.encode(piece, add_special_tokens=False).ids
        if len(encoded) != 1:
            raise RuntimeError(
                f"tokenizer: {piece!r} is {len(encoded)} tokens; raise vocab_size in "
                "train_tokenizer."
            )
        ids[piece] = encoded[0]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tasks.BOS,
        eos_token=tasks.END,
        pad_token=tasks.PAD,
        model_max_length=16384,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(out))
    return ids, -(-tokenizer.get_vocab_size() // 64) * 64
