"""Case `rounding`: how far attention and log-probabilities are from float64, ours beside stock
vLLM's, and how many answers part by that.
"""
