"""Page-sparse decode attention for vLLM, chosen by a retrieval head (SpeContext, 2512.00722)."""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of vLLM's ``vllm.general_plugins`` group; cheap, lazy and safe to call twice."""
    from specontext_vllm.engine.registration import register as register_backend

    register_backend()
