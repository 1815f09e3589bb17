"""Run by every Python process that a test starts: its folder is first in their PYTHONPATH.

Importing vLLM makes millions of objects that stay. Python's collector goes through all of them
again and again meanwhile, which takes a fifth of the time. And vLLM spawns its processes on a CPU,
each of which imports it anew for ten seconds; where a test says so they are forked instead. In a
forked process vLLM's own collections, some ten where an engine starts and ends, see what was made
there, not what was imported before.
"""

import gc
import multiprocessing
import os
from multiprocessing import resource_tracker

gc.set_threshold(50_000, 20, 20)


def leave_what_was_imported():
    gc.freeze()
    gc.unfreeze = lambda: None


os.register_at_fork(after_in_child=leave_what_was_imported)


def get_context(method=None):
    if method != "spawn":
        return given(method)
    # As a spawning process does: one for all, that ends after them.
    resource_tracker.ensure_running()
    return given("fork")


if os.environ.get("SPECONTEXT_TEST_FORKS"):
    given = multiprocessing.get_context
    multiprocessing.get_context = get_context
