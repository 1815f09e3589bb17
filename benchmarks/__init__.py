"""Benchmarks: one runner (`python -m benchmarks CASE`), one registry of cases, results with the
machine's facts.
"""
