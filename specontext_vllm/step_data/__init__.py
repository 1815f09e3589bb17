"""What passes from one stage of a decode step to the next (``engine/step.py``): plain dataclasses
around tensors, for every package from the engine down to the kernels.

H: KV heads of the target; P: tokens of a page; K: columns of the page table. A **head page** is one
page of one KV head; its id is ``page * H + head``.
"""

from specontext_vllm.step_data.pages import Misses, PageScores, PageTable, Selection, Stickiness
from specontext_vllm.step_data.rows import (
    WHOLE,
    RowPart,
    RowQueries,
    StepBatch,
    StepShape,
    bucket,
    drafts_of,
)
from specontext_vllm.step_data.schedule import ScheduledStep, StartedRequest

__all__ = [
    "WHOLE",
    "Misses",
    "PageScores",
    "PageTable",
    "RowPart",
    "RowQueries",
    "ScheduledStep",
    "Selection",
    "StartedRequest",
    "StepBatch",
    "StepShape",
    "Stickiness",
    "bucket",
    "drafts_of",
]
