"""Rows of the page tables, which follow from what vLLM captures as graphs."""

from __future__ import annotations


def table_rows(max_num_seqs: int, captured_rows: int) -> int:
    """Rows of the page tables: the largest number of decode rows in a step.

    Args:
        captured_rows: decode rows of the largest captured graph, to which smaller steps are padded;
            0 where nothing is captured.
    """
    return max(max_num_seqs, captured_rows)


def default_captured_rows(max_num_seqs: int) -> int:
    """Rows of the largest decode step that vLLM captures as a graph by default
    (vllm/config/vllm.py, ``_set_cudagraph_sizes``).

    It assumes that one token of each request fits ``--max-num-batched-tokens``. On Blackwell
    data-centre GPUs vLLM's limit is 1024 rows, not 512.
    """
    limit = min(2 * max_num_seqs, 512)
    if limit >= 8:
        step = 8 if limit < 256 else 16
        largest = limit // step * step
    else:
        largest = max(rows for rows in (1, 2, 4) if rows <= limit)
    return max(largest, max_num_seqs) if max_num_seqs <= limit else largest
