"""Attention through xformers, for GPUs that vLLM has no FlashAttention for; the extra ``xformers``
installs it.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specontext_vllm.attention.provider import SETTING, PrefillRows, head_pages
from specontext_vllm.attention.triton import TritonProvider
from specontext_vllm.config import PAGE_SIZE, ConfigError, pages_for
from specontext_vllm.float8 import KVScales
from specontext_vllm.step_data import PageTable, RowQueries


@cache
def load_cuda_runtime_12() -> None:
    """Load libcudart.so.12 where pip has put one, so that the dynamic linker has it by name.

    Symptom: every operator refuses with "xFormers wasn't build with CUDA support".
    Reason: the C++ part of xformers 0.0.35 is linked to the runtime of CUDA 12, which a torch built
        for CUDA 13 does not bring.
    Remove when: its wheels are built for CUDA 13.
    """
    nvidia = find_spec("nvidia")
    for folder in nvidia.submodule_search_locations or () if nvidia else ():
        library = Path(folder) / "cuda_runtime" / "lib" / "libcudart.so.12"
        if library.exists():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@cache
def paged_split_k() -> Any:
    """xformers' split-K operator with key blocks of one page; its own blocks of 64 tokens refuse
    smaller pages.
    """
    from xformers.ops.fmha import triton_splitk

    class PagedSplitK(triton_splitk.FwOp):
        BLOCK_N = PAGE_SIZE
        NAME = f"triton_splitK{PAGE_SIZE}F"

    return PagedSplitK


class XformersProvider(TritonProvider):
    """Decode: xformers' paged split-K kernel where it takes the dtype, head size and GPU; elsewhere
    the pages are gathered first.

    No xformers kernel takes both many query tokens and pages of 16 tokens. Prefill therefore
    gathers each row's context, which takes ``2 * H * D * max_seq_len`` values of memory in addition
    to vLLM's. Keys and values are written by vLLM's Triton kernel.

    Raises:
        ConfigError: on creation, when xformers is not installed or has no kernel for the dtype,
            head size and GPU.
    """

    def load(self) -> None:
        """See ``AttentionProvider.load``."""
        if self.soft_cap:
            raise ConfigError(
                f"{SETTING}: found 'xformers', which does not cap attention logits, as this model "
                "does; use auto."
            )
        load_cuda_runtime_12()
        try:
            from xformers.ops import fmha
        except ImportError as error:
            raise ConfigError(
                f"{SETTING}: found 'xformers', which cannot be imported here ({error}); install "
                "specontext-vllm[xformers] or use auto."
            ) from None
        self._fmha = fmha
        self._masks: dict[int, Any] = {}
        self.paged = self._try_kernels()

    def _try_kernels(self) -> bool:
        """Run both kernels on one page; return whether decode can read pages without a gather.

        xformers tells what it supports only when it is given tensors.
        """
        device = torch.device("cuda", torch.cuda.current_device())
        kv_cache = torch.zeros(
            1, self.num_kv_heads, PAGE_SIZE, 2 * self.head_dim, dtype=self.dtype, device=device
        )
        query = torch.zeros(1, self.num_heads, self.head_dim, dtype=self.dtype, device=device)
        one = torch.ones(1, dtype=torch.int32, device=device)
        rows = PrefillRows(
            torch.tensor([0, 1], dtype=torch.int32, device=device),
            one,
            torch.zeros_like(one)[None],
            1,
            1,
            [0, 1],
        )
        try:
            self.prefill(query, kv_cache, rows, torch.empty_like(query))
        except (NotImplementedError, ValueError) as error:
            # The message begins with the tensors' shapes; the operators' reasons follow.
            reason = " ".join(str(error).partition("is not supported because:")[2].split()) or str(
                error
            )
            raise ConfigError(
                f"{SETTING}: found 'xformers', but it has no kernel for {self.dtype} and heads of "
                f"{self.head_dim} on "
                f"{torch.cuda.get_device_name(device)} ({reason[:300]}); use auto."
            ) from None
        table = PageTable.allocate(1, self.num_kv_heads, 1, device)
        table.lengths.fill_(1)
        try:
            self._decode(query, kv_cache, table, 1, torch.empty_like(query), paged=True)
        except (NotImplementedError, ValueError):
            return False
        finally:
            self._masks.clear()
        return True

    def warm_up(self, table: PageTable) -> None:
        """Drop the masks of an earlier table, which they refer to: vLLM binds an engine twice."""
        self._masks.clear()

    def decode(
        self,
        query: Tensor,
        kv_cache: Tensor,
        table: PageTable,
        rows: int,
        output: Tensor,
        queries: RowQueries | None = None,
        sinks: Tensor | None = None,
        scales: KVScales | None = None,
    ) -> None:
        assert queries is None, "drafts are refused with this provider"
        assert sinks is None, "sinks are refused with this provider"
        assert scales is None, "8-bit KV is refused with this provider"
        self._decode(query, kv_cache, table, rows, output, paged=self.paged)

    def plan(self, table: PageTable, rows: int) -> None:
        """Make the mask for this number of sequences: inside a captured graph its small host
        tensors could not be copied.
        """
        self._decode_mask(table, rows * self.num_kv_heads)

    def _decode_mask(self, table: PageTable, sequences: int) -> Any:
        """Sequences of one query token whose lengths are the table's buffer."""
        if sequences not in self._masks:
            self._masks[sequences] = self._mask(1, table.max_pages, table.lengths[:sequences])
        return self._masks[sequences]

    def _mask(self, new: int, pages: int, lengths: Tensor) -> Any:
        """A mask of ``len(lengths)`` sequences of ``new`` query tokens, their keys padded to
        ``pages`` pages. It refers to ``lengths``.
        """
        padding, sequences = pages * PAGE_SIZE, len(lengths)
        mask = self._fmha.attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            [new] * sequences, padding, [padding] * sequences, device=lengths.device
        )
        mask.k_seqinfo.seqlen = lengths
        return mask

    def _decode(
        self,
        query: Tensor,
        kv_cache: Tensor,
        table: PageTable,
        rows: int,
        output: Tensor,
        *,
        paged: bool,
    ) -> None:
        sequences = rows * self.num_kv_heads
        shape = (1, sequences, self.group, self.head_dim)
        pages, mask, op = head_pages(kv_cache), self._decode_mask(table, sequences), None
        if paged:
            op = paged_split_k()
            mask = self._fmha.attn_bias.PagedBlockDiagonalPaddedKeysMask(
                q_seqinfo=mask.q_seqinfo,
                k_seqinfo=mask.k_seqinfo,
                block_tables=table.pages[:sequences],
                page_size=PAGE_SIZE,
            )
        else:
            pages = pages[table.pages[:sequences].long()]
        self._attend(query.reshape(shape), pages, mask, output.view(shape), op)

    def prefill(
        self,
        query: Tensor,
        kv_cache: Tensor,
        rows: PrefillRows,
        output: Tensor,
        sinks: Tensor | None = None,
        scales: KVScales | None = None,
    ) -> None:
        heads, d = self.num_kv_heads, self.head_dim
        width = pages_for(rows.max_seq_len)
        for row, (start, end) in enumerate(zip(rows.offsets, rows.offsets[1:])):
            new = end - start
            # Each KV head is a sequence, as in a page table.
            pages = kv_cache[rows.block_table[row, :width].long()].transpose(0, 1).contiguous()
            mask = self._mask(new, width, rows.seq_lens[row : row + 1].repeat(heads))
            by_head = (
                query[start:end]
                .reshape(new, heads, self.group, d)
                .transpose(0, 1)
                .reshape(1, heads * new, self.group, d)
            )
            result = torch.empty_like(by_head)
            self._attend(by_head, pages, mask, result)
            output[start:end].view(new, heads, self.group, d).copy_(
                result.view(heads, new, self.group, d).transpose(0, 1)
            )

    def _attend(
        self, query: Tensor, pages: Tensor, mask: Any, output: Tensor, op: Any = None
    ) -> None:
        """``query [1, N, group, D]`` over the keys and values in ``pages [..., P, 2 * D]``, which
        all query heads share.
        """
        kv = pages.view(1, -1, 1, 2 * self.head_dim).expand(-1, -1, self.group, -1)
        output.copy_(
            self._fmha.memory_efficient_attention_forward(
                query,
                kv[..., : self.head_dim],
                kv[..., self.head_dim :],
                attn_bias=mask,
                scale=self.scale,
                op=op,
            )
        )
