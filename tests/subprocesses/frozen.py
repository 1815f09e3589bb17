"""The last import of the process from which others are forked."""

import contextlib
import gc

with contextlib.suppress(ImportError):
    import setproctitle

    # vLLM names its processes. The place of a name can be found only until the environment changes.
    setproctitle.getproctitle()

# Collections see nothing that is older than this, nor do they touch its memory, which all share.
gc.collect()
gc.freeze()
