"""Tokens and pages."""

PAGE_SIZE = 16
"""Tokens in a page, the unit that is scored, selected and read. A block of vLLM's holds one or
several.
"""


def pages_for(tokens: int) -> int:
    """Pages that hold ``tokens`` tokens from the start of a page."""
    return -(-tokens // PAGE_SIZE)
