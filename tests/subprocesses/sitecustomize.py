"""Run by every Python process that a test starts: its folder is first in their PYTHONPATH.

Importing vLLM makes millions of objects that stay. Python's collector goes through all of them
again and again meanwhile, which takes a fifth of the time.
"""

import gc

gc.set_threshold(50_000, 20, 20)
