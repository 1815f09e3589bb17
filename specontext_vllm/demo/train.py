"""Train the bundled demo model and its retrieval head from scratch:
``python -m specontext_vllm.demo.train --out models/demo``.

A 5.7 M-parameter Llama (``--size larger``: 39 M) learns to answer needle questions and to recite
passages (tasks.py) at 512 to 12,288 tokens; then an EAGLE-3-shaped head learns, on the frozen
model, to look where the model looks. Everything is bounded by the clock: nine minutes on one H200.
``--size smoke`` runs all of it on a CPU with tiny sizes; its result is useless.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from specontext_vllm.distillation.draft import DraftModel, DraftShape
from specontext_vllm.distillation.losses import WINDOW, alignment_loss, attention_target, draft_loss
from specontext_vllm.synthetic import tasks

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


@dataclass(frozen=True)
class Size:
    """Shape of model and training.

    Attributes:
        phases: of the model's training: (batch, tokens, share of its time, share of drill rows).
        model_until, head_until: shares of all time at which the model's and the head's training
            end.
        align_weight: of the alignment loss beside the draft loss.
    """

    hidden: int = 256
    ffn: int = 640
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    aux_layers: tuple[int, int, int] = (1, 3, 4)
    draft_ffn: int = 192
    theta: float = 500000.0
    eps: float = 1e-5
    max_position: int = 16384
    rate: float = 1.5e-3
    head_rate: float = 1.5e-3
    phases: tuple[tuple[int, int, float, float], ...] = (
        (256, 512, 0.46, 0.4),
        (64, 2048, 0.20, 0.1),
        (32, 4096, 0.13, 0.0),
        (16, 8192, 0.14, 0.0),
        (8, 12288, 0.07, 0.0),
    )
    head_batches: tuple[tuple[int, int], ...] = ((8, 4096), (4, 8192), (8, 4096), (2, 12288))
    head_queries: int = 48
    model_until: float = 0.66
    head_until: float = 0.86
    align_weight: float = 1.0
    eval_lengths: tuple[int, ...] = (4096, 8192)
    eval_budgets: tuple[int, ...] = (256, 512)
    eval_problems: int = 16
    workers: int = 14


LARGER = Size(
    hidden=512,
    ffn=1408,
    layers=12,
    heads=8,
    kv_heads=4,
    aux_layers=(2, 6, 9),
    draft_ffn=384,
    rate=8e-4,
    head_rate=8e-4,
    phases=(
        (128, 512, 0.46, 0.4),
        (32, 2048, 0.20, 0.1),
        (16, 4096, 0.13, 0.0),
        (8, 8192, 0.14, 0.0),
        (4, 12288, 0.07, 0.0),
    ),
    model_until=0.56,
    head_until=0.90,
    align_weight=3.0,
)
"""Seven times the demo's parameters; half its batch, so that it takes as many steps in the same
time. Its head is further from trained out when the time is over (docs/accuracy.md), so it gets more
of it, and the weight that docs/distill.md found."""

SMOKE = Size(
    layers=5,
    phases=((8, 256, 0.6, 0.4), (4, 512, 0.4, 0.0)),
    head_batches=((2, 512), (1, 768)),
    head_queries=8,
    eval_lengths=(512,),
    eval_budgets=(128, 256),
    eval_problems=2,
    workers=2,
)

SIZES = {"demo": Size(), "larger": LARGER, "smoke": SMOKE}


# -- tokenizer
# ------------------------------------------------------------------------------------------------------------


def train_tokenizer(out: Path) -> tuple[dict[str, int], int]:
    """Byte-level BPE in which every piece of tasks.py is one token; saved for transformers. Returns
    (piece -> id, vocabulary size).

    Raises:
        RuntimeError: a piece is more than one token, so that lengths counted in pieces would be
            wrong.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    known = tasks.vocabulary()
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


# -- data
# -----------------------------------------------------------------------------------------------------------------


class Rows(IterableDataset):
    """Endless rows ``(ids [B, T] int16, weights [B, T] uint8 in tenths)``: one long conversation,
    several short ones packed, or a drill.

    A drill repeats stretches of random words. Without it the model learned to copy some classes of
    words and not others (nouns never, verbs always): sentences of a fixed grammar leave copying
    many partial solutions, random words only the general one.
    """

    def __init__(
        self, ids: dict[str, int], batch: int, length: int, seed: int, drills: float
    ) -> None:
        self.ids, self.batch, self.length, self.seed, self.drills = ids, batch, length, seed, drills
        self.words = np.array(
            [i for piece, i in ids.items() if piece not in tasks.SPECIALS], np.int16
        )

    def drill(self, rng: Random) -> tuple[np.ndarray, np.ndarray]:
        source = np.random.default_rng(rng.getrandbits(63))
        ids = source.choice(self.words, self.length)
        weights = np.full(self.length, 0, np.uint8)
        at = 1
        while at < self.length:
            count = int(source.integers(8, 80))
            again = at + count + int(source.integers(0, 80))
            room = min(count, self.length - again)
            if room > 1:
                ids[again : again + room] = ids[at : at + room]
                # The first word of a repetition cannot be known.
                weights[again + 1 : again + room] = 10
            at = again + count
        ids[0] = self.ids[tasks.BOS]
        return ids, weights

    def row(self, rng: Random) -> tuple[np.ndarray, np.ndarray]:
        if rng.random() < self.drills:
            return self.drill(rng)
        ids = np.full(self.length, self.ids[tasks.PAD], np.int16)
        weights = np.zeros(self.length, np.uint8)
        at = 0
        packed = rng.random() < 0.25
        while self.length - at >= 96:
            room = self.length - at
            size = min(room, rng.randint(96, max(96, self.length // 2))) if packed else room
            for text, answer in tasks.training_document(rng, size):
                new = [self.ids[piece] for piece in tasks.pieces(text)][: self.length - at]
                ids[at : at + len(new)] = new
                weights[at : at + len(new)] = 10 if answer else 1
                at += len(new)
            if not packed and self.length - at < 256:
                break
        return ids, weights

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker = info.id if info is not None else 0
        rng = tasks.random_for(self.seed * 1000 + worker, "train")
        while True:
            rows = [self.row(rng) for _ in range(self.batch)]
            yield (
                torch.from_numpy(np.stack([r[0] for r in rows])),
                torch.from_numpy(np.stack([r[1] for r in rows])),
            )


def batches(
    ids: dict[str, int], batch: int, length: int, seed: int, workers: int, drills: float = 0.0
):
    """Iterator of batches made by worker processes."""
    return iter(
        DataLoader(
            Rows(ids, batch, length, seed, drills),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4,
            pin_memory=torch.cuda.is_available(),
        )
    )


# -- model
# ----------------------------------------------------------------------------------------------------------------


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE in rotate-half form on ``x [..., T, D]`` at ``positions [T]``."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[:, None].float() * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    """A Llama decoder layer."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        h, q, kv = size.hidden, size.heads * size.head_dim, size.kv_heads * size.head_dim
        self.input_layernorm, self.post_attention_layernorm = (
            nn.Parameter(torch.ones(h)),
            nn.Parameter(torch.ones(h)),
        )
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(h, q, False),
            nn.Linear(h, kv, False),
            nn.Linear(h, kv, False),
        )
        self.o_proj = nn.Linear(q, h, False)
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(h, size.ffn, False),
            nn.Linear(h, size.ffn, False),
            nn.Linear(size.ffn, h, False),
        )

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.size.eps)

    def qkv(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.norm(x, self.input_layernorm)
        q, k, v = (
            p(y).unflatten(-1, (-1, self.size.head_dim)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, positions, self.size.theta), rotate(k, positions, self.size.theta), v

    def rest(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(-2))
        y = self.norm(x, self.post_attention_layernorm)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = self.qkv(x, positions)
        return self.rest(
            x, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        )


class Model(nn.Module):
    """A Llama; tensors are named so that ``checkpoint`` is a renaming."""

    def __init__(self, size: Size, vocabulary: int) -> None:
        super().__init__()
        self.size = size
        self.embed_tokens = nn.Embedding(vocabulary, size.hidden)
        self.layers = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.Parameter(torch.ones(size.hidden))
        self.lm_head = nn.Linear(size.hidden, vocabulary, False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0.0, 0.02)
        for block in self.layers:
            block.o_proj.weight.data /= math.sqrt(2 * size.layers)
            block.down_proj.weight.data /= math.sqrt(2 * size.layers)

    def head(self, x: Tensor) -> Tensor:
        return self.lm_head(F.rms_norm(x, (x.shape[-1],), self.norm, self.size.eps))

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.embed_tokens(ids)
        for block in self.layers:
            x = block(x, positions)
        return self.head(x)

    @torch.no_grad()
    def teach(self, ids: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        """``(aux [B, T, 3H], queries, keys per layer, logits)`` of a frozen forward pass."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x, aux, queries, keys = self.embed_tokens(ids), [], [], []
        for i, block in enumerate(self.layers):
            if i in self.size.aux_layers:
                aux.append(x)
            q, k, v = block.qkv(x, positions)
            queries.append(q)
            keys.append(k)
            x = block.rest(
                x, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            )
        return torch.cat(aux, -1), queries, keys, self.head(x)

    def checkpoint(self) -> dict[str, Tensor]:
        """Tensors under Hugging Face's Llama names."""
        out = {
            "lm_head.weight": self.lm_head.weight,
            "model.embed_tokens.weight": self.embed_tokens.weight,
            "model.norm.weight": self.norm,
        }
        for i, block in enumerate(self.layers):
            for name, value in block.named_parameters():
                stem = name.removesuffix(".weight")
                part = (
                    "self_attn."
                    if stem in ("q_proj", "k_proj", "v_proj", "o_proj")
                    else "mlp."
                    if "proj" in stem
                    else ""
                )
                out[f"model.layers.{i}.{part}{stem}.weight"] = value
        return out


def save_model(model: Model, vocabulary: int, ids: dict[str, int], out: Path) -> None:
    """Write the model as a Hugging Face folder in bfloat16."""
    from safetensors.torch import save_file

    size = model.size
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": size.max_position,
        "rms_norm_eps": size.eps,
        "rope_theta": size.theta,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": ids[tasks.BOS],
        "eos_token_id": ids[tasks.END],
        "pad_token_id": ids[tasks.PAD],
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {
        k: v.detach().to(torch.bfloat16).cpu().contiguous() for k, v in model.checkpoint().items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def draft_shape(size: Size, vocabulary: int) -> DraftShape:
    """The head that goes with a model of this size."""
    return DraftShape(
        hidden=size.hidden,
        heads=size.heads,
        kv_heads=size.kv_heads,
        head_dim=size.head_dim,
        ffn=size.draft_ffn,
        vocabulary=vocabulary,
        draft_vocabulary=vocabulary,
        rope_theta=size.theta,
        rope_scaling=None,
        eps=size.eps,
        max_position=size.max_position,
        aux_layers=size.aux_layers,
    )


def check_equals_transformers(model: Model, folder: Path, log: Log) -> None:
    """Compare logits with transformers' Llama loaded from the folder, both in float32 on the CPU.

    Raises:
        RuntimeError: they differ, so that the folder would serve another model.
    """
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    mine = Model(model.size, model.embed_tokens.num_embeddings)
    mine.load_state_dict(
        {k: v.detach().to(torch.bfloat16).float().cpu() for k, v in model.state_dict().items()}
    )
    torch.set_float32_matmul_precision("highest")
    sample = torch.randint(0, model.embed_tokens.num_embeddings, (1, 300))
    with torch.no_grad():
        difference = (mine(sample) - reference(sample).logits).abs().max().item()
    log(f"largest difference of logits to transformers' Llama: {difference:.2e}")
    if not difference < 1e-3:
        raise RuntimeError(
            f"{folder}: transformers computes other logits (difference {difference:.2e})."
        )


# -- training
# -------------------------------------------------------------------------------------------------------------


class Log:
    """Lines to the terminal and to a file, with seconds since the start."""

    def __init__(self, file: Path) -> None:
        self.start, self.file = time.time(), file.open("w")

    def __call__(self, text: str) -> None:
        line = f"[{self.seconds:6.1f} s] {text}"
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()

    @property
    def seconds(self) -> float:
        return time.time() - self.start


def cosine(rate: float, step: int, warmup: int, progress: float) -> float:
    """Learning rate: linear warm-up, then a cosine down to a twentieth over ``progress`` 0..1."""
    return (
        rate
        * min(1.0, (step + 1) / warmup)
        * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    )


def to_device(batch: tuple[Tensor, Tensor], device: str) -> tuple[Tensor, Tensor]:
    ids, weights = batch
    return ids.to(device, non_blocking=True).long(), weights.to(
        device, non_blocking=True
    ).float() / 10


def train_model(model: Model, ids: dict[str, int], seconds: float, device: str, log: Log) -> None:
    """Length curriculum; each phase ends by the clock."""
    size = model.size
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=size.rate,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        fused=device == "cuda",
    )
    if device == "cuda":
        # Layers share their code, so one is compiled for all of them.
        for block in model.layers:
            block.compile()
    begun, steps, tokens, share = time.time(), 0, 0, 0.0
    for number, (batch, length, part, drills) in enumerate(size.phases):
        data = batches(ids, batch, length, seed=number + 1, workers=size.workers, drills=drills)
        share += part
        shown, shown_tokens, right = time.time(), tokens, 0.0
        while time.time() - begun < seconds * share:
            x, w = to_device(next(data), device)
            for group in optimizer.param_groups:
                group["lr"] = cosine(size.rate, steps, 200, (time.time() - begun) / seconds)
            with torch.autocast(
                device, torch.bfloat16, enabled=device == "cuda"
            ):  # emulated on most CPUs
                logits = model(x[:, :-1])
            loss = F.cross_entropy(
                logits.float().flatten(0, 1), x[:, 1:].flatten(), reduction="none"
            ).view(x.shape[0], -1)
            weights = w[:, 1:]
            loss = (loss * weights).sum() / weights.sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps, tokens = steps + 1, tokens + x.numel()
            if time.time() - shown > 5:
                right = right_share(logits, x, w)
                rate = (tokens - shown_tokens) / (time.time() - shown)
                log(
                    f"model: {length} tokens, step {steps}, loss {loss.item():.3f}, right answer "
                    f"tokens {right:.4f} (teacher-forced), "
                    f"{rate / 1e6:.2f} M tokens/s, {tokens / 1e6:.0f} M in all"
                )
                shown, shown_tokens = time.time(), tokens
        log(f"model: end of {length} tokens after {steps} steps")
        if device == "cuda" and number == 0 and right < 0.9:
            raise RuntimeError(
                f"the model did not learn to copy at {length} tokens ({right:.3f} of the answer "
                "tokens right); longer rows will not help."
            )
        del data


def right_share(logits: Tensor, ids: Tensor, weights: Tensor) -> float:
    """Share of the answer tokens that are the most likely ones."""
    return (logits.argmax(-1) == ids[:, 1:])[weights[:, 1:] > 0.5].float().mean().item()


def train_head(
    model: Model, draft: DraftModel, ids: dict[str, int], seconds: float, device: str, log: Log
) -> None:
    """Draft and alignment loss on the frozen model, lengths mixed."""
    size = model.size
    optimizer = torch.optim.AdamW(
        draft.parameters(), lr=size.head_rate, betas=(0.9, 0.95), fused=device == "cuda"
    )
    workers = max(1, size.workers // len(set(size.head_batches)))
    sources = {
        shape: batches(ids, *shape, seed=100 + i, workers=workers)
        for i, shape in enumerate(dict.fromkeys(size.head_batches))
    }
    begun, step, shown = time.time(), 0, time.time()
    while (passed := time.time() - begun) < seconds:
        x, w = to_device(next(sources[size.head_batches[step % len(size.head_batches)]]), device)
        for group in optimizer.param_groups:
            group["lr"] = cosine(size.head_rate, step, 100, passed / seconds)
        with torch.autocast(
            device, torch.bfloat16, enabled=device == "cuda"
        ):  # emulated on most CPUs
            aux, queries, keys, teacher = model.teach(x)
            # The pair (token p+1, aux p) stands at p+1; token 0 has none.
            positions = torch.arange(1, x.shape[1], device=device)
            fused, q, k, inputs = draft.queries_keys(
                model.embed_tokens(x[:, 1:]).detach(), aux[:, :-1], positions
            )
            # Tokens whose successor is an answer matter most; that includes the last token before
            # an answer.
            drafted = torch.roll(w[:, 1:], -1, 1) + 0.02
            loss_draft = draft_loss(draft.logits(fused, q, k, inputs), teacher[:, 1:], drafted)
            hot = (drafted > 0.5).float() + 0.05 * (w[:, 1:] > 0).float() + 1e-4
            at = torch.multinomial(hot, size.head_queries)
            target, mass = attention_target(
                [t[:, :, 1:] for t in queries], [t[:, :, 1:] for t in keys], at, WINDOW
            )
            loss_align = alignment_loss(q, k, at, target, mass, WINDOW)
        optimizer.zero_grad(set_to_none=True)
        (loss_draft + size.align_weight * loss_align).backward()
        nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        step += 1
        if time.time() - shown > 5:
            log(
                f"head: step {step}, draft loss {loss_draft.item():.3f}, alignment loss "
                f"{loss_align.item():.3f}"
            )
            shown = time.time()
    log(
        f"head: {step} steps, draft loss {loss_draft.item():.3f}, alignment loss "
        f"{loss_align.item():.3f}"
    )


# -- evaluation
# -----------------------------------------------------------------------------------------------------------


class Decoder:
    """Greedy decoding with page selection in plain torch, as the engine does it: one selection a
    step for all layers.
    """

    page = 16

    def __init__(self, model: Model, draft: DraftModel | None) -> None:
        self.model, self.draft = model, draft
        self.device = model.norm.device

    @torch.no_grad()
    def prefill(self, prompt: list[int]) -> dict:
        """State after the prompt, from which any number of decodes may start."""
        x = torch.tensor([prompt], device=self.device)
        positions = torch.arange(x.shape[1], device=self.device)
        h, keys, values, aux = self.model.embed_tokens(x), [], [], []
        for i, block in enumerate(self.model.layers):
            if i in self.model.size.aux_layers:
                aux.append(h)
            q, k, v = block.qkv(h, positions)
            keys.append(k)
            values.append(v)
            h = block.rest(
                h, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            )
        aux = torch.cat(aux, -1)
        head_keys = None
        if self.draft is not None:
            embeds = self.model.embed_tokens(x[:, 1:])
            _, _, head_keys, _ = self.draft.queries_keys(embeds, aux[:, :-1], positions[1:])
            head_keys = F.pad(head_keys, (0, 0, 1, 0))
        return {
            "keys": keys,
            "values": values,
            "aux": aux[:, -1:],
            "head": head_keys,
            "next": self.model.head(h[:, -1:]).argmax(-1),
            "length": len(prompt),
        }

    @torch.no_grad()
    def decode(
        self,
        state: dict,
        method: str,
        budget: int,
        limit: int,
        stop: int,
        generator: torch.Generator,
    ) -> list[int]:
        """Up to ``limit`` tokens.

        Args:
            state: of ``prefill``; not changed.
            method: dense, dlm, common (the pages with the largest weight that any layer and query
                head gives them when this step is computed densely first: no head that chooses for
                    all layers at once is likely to do better), recent or random.
            budget: tokens.
        """
        keys, values, aux, head = (
            list(state["keys"]),
            list(state["values"]),
            state["aux"],
            state["head"],
        )
        token, length, out = state["next"], state["length"], []
        while len(out) < limit:
            out.append(int(token))
            if out[-1] == stop:
                break
            position = torch.tensor([length], device=self.device)
            length += 1
            embed = self.model.embed_tokens(token)
            weight = kept = None
            if self.draft is not None:
                _, q, k, _ = self.draft.queries_keys(embed, aux, position)
                head = torch.cat([head, k], 2)
            if method != "dense" and -(-length // self.page) > budget // self.page:
                if method == "dlm":
                    weight = self.weights(q, head, unread=1).amax(2)
                elif method == "common":
                    _, _, looked = self.step(embed, position, list(keys), list(values), None)
                    weight = torch.stack([w.amax(2) for w in looked]).amax(0)
                kept = self.select(method, budget, weight, length, generator)
            h, aux, _ = self.step(embed, position, keys, values, kept)
            token = self.model.head(h).argmax(-1)
        return out

    def step(
        self,
        h: Tensor,
        position: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        kept: Tensor | None,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """One token through all layers, which read the ``kept [1, nkv, T]`` tokens: its last state,
        its auxiliary states, and each layer's weights.

        ``keys`` and ``values`` are replaced, layer by layer, by those with the new token.
        """
        aux, weights = [], []
        for i, block in enumerate(self.model.layers):
            if i in self.model.size.aux_layers:
                aux.append(h)
            q, k, v = block.qkv(h, position)
            keys[i], values[i] = torch.cat([keys[i], k], 2), torch.cat([values[i], v], 2)
            weights.append(self.weights(q, keys[i], kept=kept))
            mixed = torch.einsum("bkgt,bktd->bkgd", weights[-1], values[i].float()).flatten(1, 2)[
                :, :, None
            ]
            h = block.rest(h, mixed.to(h.dtype))
        return h, torch.cat(aux, -1), weights

    def weights(
        self, q: Tensor, keys: Tensor, kept: Tensor | None = None, unread: int = 0
    ) -> Tensor:
        """Softmax ``[1, nkv, G, T]`` of one query over the keys, less the first ``unread`` ones and
        those that are not kept.
        """
        grouped = q.unflatten(1, (keys.shape[1], -1))[..., 0, :].float()
        logits = torch.einsum("bkgd,bktd->bkgt", grouped, keys.float()) * q.shape[-1] ** -0.5
        if kept is not None:
            logits = logits.masked_fill(~kept[:, :, None], float("-inf"))
        logits[..., :unread] = float("-inf")
        return logits.softmax(-1)

    def select(
        self,
        method: str,
        budget: int,
        weight: Tensor | None,
        length: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Kept tokens ``[1, nkv, length]``: page 0, the five newest pages, and the best of the
        rest, by ``weight [1, nkv, length]`` if there is one.
        """
        nkv, count = self.model.size.kv_heads, -(-length // self.page)
        if weight is not None:
            pages = (
                F.pad(weight, (0, count * self.page - length))
                .unflatten(-1, (count, self.page))
                .amax(-1)
            )
        elif method == "recent":
            pages = torch.arange(count, device=self.device).float().expand(1, nkv, count).clone()
        else:
            pages = torch.rand(1, nkv, count, device=self.device, generator=generator)
        pages[..., 0] = pages[..., -5:] = float("inf")
        chosen = torch.zeros_like(pages, dtype=torch.bool).scatter_(
            2, pages.topk(budget // self.page, -1).indices, True
        )
        return chosen.repeat_interleave(self.page, -1)[..., :length]


def evaluate(
    model: Model, draft: DraftModel, ids: dict[str, int], deadline: float, log: Log
) -> None:
    """Held-out needle and recitation problems in every layout, dense and sparse; stops at
    ``deadline`` seconds of the log.
    """
    size = model.size
    text_of = {v: k for k, v in ids.items()}
    decoder = Decoder(model, draft)
    generator = torch.Generator(device=model.norm.device).manual_seed(0)
    columns = [
        ("dense", 0),
        *[("dlm", b) for b in size.eval_budgets],
        ("recent", size.eval_budgets[-1]),
        ("random", size.eval_budgets[-1]),
    ]
    for length in size.eval_lengths:
        for kind in ("needle", "recitation"):
            results: dict[tuple[str, int], list[float]] = {c: [] for c in columns}
            layouts: dict[str, list[float]] = {}
            for seed in range(
                size.eval_problems if kind == "needle" else max(2, size.eval_problems // 2)
            ):
                if log.seconds > deadline:
                    break
                problem = tasks.make_problem(kind, seed=seed, approx_tokens=length)
                roles = [
                    (("text" if problem.layout == "plain" else m["role"]), m["content"])
                    for m in problem.messages
                ]
                stretches = [text for text, _ in tasks.render(roles)]
                if problem.layout != "plain":
                    stretches.append(tasks.ASSISTANT)
                prompt = [ids[p] for text in stretches for p in tasks.pieces(text)]
                state = decoder.prefill(prompt)
                for method, budget in columns:
                    limit = 20 if kind == "needle" else 96
                    reply = decoder.decode(state, method, budget, limit, ids[tasks.END], generator)
                    value = tasks.score(
                        problem, "".join(text_of.get(t, "?") for t in reply if t != ids[tasks.END])
                    )
                    results[method, budget].append(value)
                    if method == "dense":
                        layouts.setdefault(problem.layout, []).append(value)
            row = "  ".join(
                f"{m}{f'@{b}' if b else ''} {np.mean(v):.3f}" for (m, b), v in results.items() if v
            )
            log(f"eval {kind} at {length} tokens ({len(results[columns[0]])} problems): {row}")
            log(
                "     dense by layout: "
                + "  ".join(f"{k} {np.mean(v):.2f}" for k, v in layouts.items())
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("models/demo"))
    parser.add_argument(
        "--minutes", type=float, default=9.2, help="wall-clock minutes for everything"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--size", choices=SIZES, default="demo", help="smoke: tiny, to check the script"
    )
    args = parser.parse_args()

    size = SIZES[args.size]
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out / "training_log.txt")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    machine = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else platform.processor() or platform.machine()
    )
    log(f"torch {torch.__version__} on {machine}, seed {args.seed}, {args.minutes} minutes, {size}")
    ids, vocabulary = train_tokenizer(args.out)
    total = args.minutes * 60
    model = Model(size, vocabulary).to(args.device)
    log(
        f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, vocabulary "
        f"{vocabulary}"
    )
    train_model(model, ids, size.model_until * total - log.seconds, args.device, log)
    save_model(model, vocabulary, ids, args.out)
    # From here on the weights are the ones that were saved.
    model.load_state_dict({k: v.to(torch.bfloat16).float() for k, v in model.state_dict().items()})
    model.requires_grad_(False)
    draft = DraftModel(draft_shape(size, vocabulary)).to(args.device)
    train_head(model, draft, ids, size.head_until * total - log.seconds, args.device, log)
    draft.save(args.out / "retrieval_head")
    draft.load_state_dict({k: v.to(torch.bfloat16).float() for k, v in draft.state_dict().items()})
    evaluate(model, draft, ids, total - 12, log)
    check_equals_transformers(model, args.out, log)
    log("done")


if __name__ == "__main__":
    main()
