"""A pytest plugin: whatever a session starts ends with it, also when the session itself is told to
end (SIGTERM).

Without it SIGTERM kills pytest on the spot: no fixture is torn down, and servers, which run in
    sessions of their own, go on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType

import psutil
import pytest

MARK = "SPECONTEXT_TEST_SESSIONS"
"""Environment variable that all processes of a session inherit: the ids of its process and of the
sessions around it.
"""
GRACE_SECONDS = 5.0
"""For what is left to end in order, before it is killed."""


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Leftovers(config))


class Leftovers:
    """Turns SIGTERM into an orderly end of the session, and ends what its tests have left running.

    Args:
        config: of this process: a whole session's, or that of one of pytest-xdist's workers, whose
            session ends what it leaves.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._pid = os.getpid()
        self._is_worker = hasattr(config, "workerinput")
        self._session: pytest.Session | None = None
        self._told = False
        if not self._is_worker:
            os.environ[MARK] = f"{os.environ.get(MARK, '')} {self._pid}".strip()
        self._listen()

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        # Ray, where a test has started it, listens to the signal itself.
        self._listen()

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        if self._is_worker:
            return
        if left := self._left():
            names = ", ".join(f"{pid} ({name})" for pid, name in left.items())
            print(f"ending what this test session left running: {names}", file=sys.stderr)
            _end([psutil.Process(pid) for pid in left if psutil.pid_exists(pid)])

    def _left(self) -> dict[int, str]:
        """Processes of this session but itself, by id."""
        found = {}
        # A process that was forked shows the environment in which its parent was started, before
        # the mark.
        children = {child.pid for child in psutil.Process().children(recursive=True)}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                # Python's resource trackers clean up and leave when the processes that they watch
                # have left.
                is_ours = (
                    process.pid in children
                    or str(self._pid) in process.environ().get(MARK, "").split()
                )
                is_tracker = "resource_tracker" in "".join(process.cmdline())
                if (
                    is_ours
                    and not is_tracker
                    and process.pid != self._pid
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found[process.pid] = process.name()
        return found

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._end_session)

    def _end_session(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked child, which has inherited this.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        if self._told:
            # The teardown is under way, and is not to be broken off.
            return
        self._told = True
        if self._session is not None:
            # For a test that takes the interrupt for its own.
            self._session.shouldstop = "SIGTERM"
            if self._session.config.pluginmanager.has_plugin("dsession"):
                for worker in psutil.Process().children():
                    worker.terminate()
        raise KeyboardInterrupt("SIGTERM")


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=GRACE_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=GRACE_SECONDS)
