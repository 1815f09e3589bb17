"""Triton kernels, installed as ``specontext_vllm.triton_kernels``.

Names: ``p_`` pointers, ``b_`` tiles, ``o_`` offsets, ``m_`` masks, ``i_`` program ids. A *head
page* is one page of one KV head, ``[P, ...]`` contiguous; its id is ``block * H + head``.
"""
