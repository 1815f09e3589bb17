"""Case `host`: what of a decode step the host does, and for how long the GPU computes; where the
model is small, the host is what a step waits for.
"""
