"""Run by every Python process that a test starts: its folder is first in their PYTHONPATH.

Importing vLLM makes millions of objects that stay. Python's collector goes through all of them
again and again meanwhile, which takes a fifth of the time. And vLLM spawns its processes on a CPU,
each of which imports it anew for ten seconds; where a test says so they are forked instead.
"""

import gc
import multiprocessing
import os
from multiprocessing import resource_tracker

gc.set_threshold(50_000, 20, 20)


def get_context(method=None):
    if method != "spawn":
        return given(method)
    # As a spawning process does: one for all, that ends after them.
    resource_tracker.ensure_running()
    return given("fork")


if os.environ.get("SPECONTEXT_TEST_FORKS"):
    given = multiprocessing.get_context
    multiprocessing.get_context = get_context
