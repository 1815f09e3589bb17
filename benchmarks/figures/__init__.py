"""Case `figures`: what README.md and docs/*.md say in figures is what the result files say.

Whole tables and pictures stand between two marker lines and are made from a result
(``markers``). Figures in sentences are listed in docs/figures.toml (``prose``).
"""
