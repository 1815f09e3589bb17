"""How a checkpoint is refused."""


class HeadError(ValueError):
    """A checkpoint that cannot serve as retrieval head. The message is one sentence: what was
    found, what to do.
    """
