"""Case `drafts`: tokens per second with drafts and in lossless mode, at a set acceptance."""

from __future__ import annotations
