"""Figures for operators: what /metrics holds of specontext, how it gets there from the workers, and
`specontext top`; no vLLM.
"""
