"""Case `fuzz`: random mixes of requests against stock vLLM under a budget over the context, and two
tiers against one under a small one.
"""
