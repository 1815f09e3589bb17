"""Case `cpu`: prefill and decode steps on a CPU, stock vLLM and specontext taking turns, beside the
byte limit.
"""
