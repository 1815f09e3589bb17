"""All contact with vLLM is marked where it stands, and what a mark names exists
(scripts/vllm_contacts.py).
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from scripts.vllm_contacts import Package, contacts, unmarked
from scripts.vllm_contacts_page import as_markdown
from scripts.vllm_sources import exists_in_vllm

RUNNER = "vllm.v1.worker.gpu.model_runner.GPUModelRunner"


@pytest.fixture(scope="module")
def package() -> Package:
    return Package()


def test_every_contact_with_vllm_is_marked(package):
    assert unmarked(package) == []


def test_all_kinds_of_contact_are_found(package):
    found = {(contact.kind, contact.what) for contact in contacts(package)}
    for known in (
        ("import", "vllm.v1.core.sched.scheduler.Scheduler"),
        ("override", f"{RUNNER}.prepare_attn"),
        ("override", "vllm.v1.attention.backend.AttentionBackend.get_name"),
        ("override", "vllm.v1.worker.gpu_worker.Worker.determine_available_memory"),
        ("assignment", "module.allocate_kv_cache"),
        ("assignment", "coordinator.cache_blocks"),
        ("assignment", "runner.use_aux_hidden_state_outputs"),
        ("private", "self._init_reorder_batch_threshold"),
        ("use", f"{RUNNER}.execute_model_state"),
    ):
        assert known in found, known


def scan(tmp_path, source: str) -> list[str]:
    folder = tmp_path / "specontext_vllm" / "engine"
    folder.mkdir(parents=True)
    (folder / "new.py").write_text(textwrap.dedent(source))
    return unmarked(Package(tmp_path / "specontext_vllm"))


MARKED = '''
    """A module.

    vLLM: its runner.
    """
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
'''
REASONS = "Symptom: it breaks.\n    Reason: no hook.\n    Remove when: there is one."


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("from vllm.logger import init_logger\n", "no line vLLM:"),
        ('"""A.\n\nvLLM: b.\n"""\nfrom vllm.logger import no_such_name\n', "not in the installed"),
        (
            MARKED + "    class R(GPUModelRunner):\n        def prepare_attn(self, b): ...\n",
            f"no line Overrides: {RUNNER}.prepare_attn",
        ),
        (
            MARKED
            + "    class R(GPUModelRunner):\n        def prepare_attn(self, b):\n"
            + '            """A.\n\n            Overrides: vllm.Other.prepare_attn\n'
            '            """\n',
            "the mark names vllm.Other.prepare_attn",
        ),
        (
            MARKED
            + "    class R(GPUModelRunner):\n        def renamed_there(self, b):\n"
            + f'            """A.\n\n            Overrides: {RUNNER}.renamed_there\n'
            '            """\n',
            f"{RUNNER}.renamed_there: not in the installed",
        ),
        (
            MARKED + "    class R(GPUModelRunner):\n        def go(self):\n"
            "            return self._renamed_there()\n",
            "neither ours nor in the installed",
        ),
        (
            MARKED + "    class R(GPUModelRunner):\n        def go(self):\n"
            "            self.execute_model_state = None\n",
            "Remove when:",
        ),
        (MARKED + "    def f(vllm_config):\n        vllm_config.a_b = 1\n", "Remove when:"),
        (MARKED + "    def f(x):\n        setattr(x.config, 'a_b', 1)\n", "Remove when:"),
        (MARKED + "    def f(platform):\n        return platform._enum\n", "Remove when:"),
        (
            MARKED
            + '    def f():\n        """A.\n\n        Uses: vllm.config.NoSuch.x\n        """\n',
            "not in the installed",
        ),
    ],
    ids=[
        "import",
        "import of nothing",
        "override",
        "override of another",
        "override of nothing",
        "private of nothing",
        "vLLM's attribute of self",
        "attribute of vLLM's",
        "setattr",
        "private",
        "use of nothing",
    ],
)
def test_what_is_not_marked_is_found(tmp_path, source, complaint):
    found = scan(tmp_path, source)
    assert found and complaint in found[0]


def test_what_is_marked_passes(tmp_path):
    source = f'''
"""A module.

vLLM: its runner.
"""
from vllm.v1.worker.gpu.model_runner import GPUModelRunner


class R(GPUModelRunner):
    own = 1

    def prepare_attn(self, batch):
        """A.

        Overrides: {RUNNER}.prepare_attn
        """
        self._mine = super().prepare_attn(batch)
        return self._mine


def f(platform):
    """A.

    {REASONS}
    """
    platform.a_b = platform._enum
'''
    assert scan(tmp_path, source) == []


@pytest.mark.parametrize("here", ["first", "second", "neither"])
def test_a_name_that_has_moved_is_looked_for_in_both_places(tmp_path, here):
    first = "vllm.logger" if here == "first" else "vllm.no_such"
    second = "vllm.logger" if here == "second" else "vllm.no_such_either"
    found = scan(
        tmp_path,
        f'''
        """A.

        vLLM: its log.
        """
        try:
            from {first} import init_logger
        except ImportError:
            from {second} import init_logger
        ''',
    )
    assert [sentence.endswith("not in the installed vLLM") for sentence in found] == (
        [True] if here == "neither" else []
    )


def test_names_in_vllm_are_found_through_bases_and_imports():
    assert exists_in_vllm(f"{RUNNER}.execute_model_state")
    assert exists_in_vllm("vllm.config.VllmConfig") and exists_in_vllm("vllm.logger.init_logger")
    assert not exists_in_vllm(f"{RUNNER}.no_such") and not exists_in_vllm("vllm.no_such.Name")


def test_vllm_is_read_and_not_imported():
    code = (
        "import sys; from scripts.vllm_contacts import Package, unmarked; unmarked(Package())\n"
        "assert not any(name.split('.')[0] in ('vllm', 'torch') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_has_every_override_and_reason(package):
    page = as_markdown(package)
    assert f"`{RUNNER}.sample_tokens`" in page and "engine.compat.choose_worker" in page
