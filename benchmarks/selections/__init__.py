"""Case `selections`: how selections of real text and of long generations change from step to step,
and what of them a hot buffer misses.
"""
