"""All that touches vLLM: registration, backend, metadata, workers, the two runner adapters."""
