"""The plugin in a process: lazy, idempotent, picklable in spawned children, and nobody else's
backend changes.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import cloudpickle
import pytest

import specontext_vllm

IN_A_CHILD = """
import logging, pickle, sys

class Absent:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "specontext_vllm":
            raise ModuleNotFoundError(f"No module named {name!r}")

logging.basicConfig(level=logging.INFO)
absent = Absent()
sys.meta_path.insert(0, absent)
stock = pickle.load(open(sys.argv[1], "rb"))
print(stock.attention_config.backend)
sys.meta_path.remove(absent)
member = pickle.load(open(sys.argv[2], "rb"))
assert member.name == "SPECONTEXT", member
print(member.get_class().get_name())
"""


@pytest.fixture(scope="module")
def member():
    specontext_vllm.register()
    specontext_vllm.register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum["SPECONTEXT"]


def test_registering_loads_neither_torch_nor_vllm():
    code = (
        "import sys, specontext_vllm; print(sorted({'torch', 'vllm', 'transformers', 'triton'} "
        "& set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_child_unpickles_a_stock_config_without_our_plugin_and_ours_before_it_is_loaded(
    member, tmp_path
):
    from vllm.config import VllmConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    config = VllmConfig()
    config.attention_config.backend = AttentionBackendEnum.FLASH_ATTN
    pickles = [tmp_path / "stock", tmp_path / "ours"]
    for path, kept in zip(pickles, (config, member)):
        path.write_bytes(pickle.dumps(kept))
    done = subprocess.run(
        [sys.executable, "-c", IN_A_CHILD, *pickles],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"VLLM_PLUGINS": ""},
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.strip().splitlines()
    assert "AttentionBackendEnum.FLASH_ATTN" in printed and printed[-1] == "SPECONTEXT"
    # vLLM's line about a new member would stand in every server's log, whatever its backend.
    assert "Registered new attention backend" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "copier",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: cloudpickle.loads(cloudpickle.dumps(m)),
    ],
)
def test_copies_are_the_member_itself(member, copier):
    assert copier(member) is member


def test_other_backends_still_pickle_to_themselves(member):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    for other in AttentionBackendEnum:
        assert pickle.loads(pickle.dumps(other)) is other and copy.deepcopy(other) is other
        assert (b"specontext" in pickle.dumps(other)) is (other is member)


def test_the_platform_is_wrapped_once_and_asks_only_when_selected(member):
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    platform = type(current_platform)
    before = platform.check_and_update_config.__func__
    specontext_vllm.register()
    assert platform.check_and_update_config.__func__ is before
    if platform._enum.name == "CPU":
        selector = SimpleNamespace(use_mla=False, use_sparse=False, kv_cache_dtype="auto")
        assert "specontext" in current_platform.get_attn_backend_cls(member, selector)
        for other in (None, AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.FLASH_ATTN):
            assert (
                current_platform.get_attn_backend_cls(other, selector)
                == AttentionBackendEnum.CPU_ATTN.get_path()
            )


def test_the_name_answers_to_the_enum(member):
    from specontext_vllm.engine.backend import SpeContextBackend

    assert SpeContextBackend.get_name() == member.name


def test_our_kernels_folder_is_not_taken_for_the_package_vllm_probes_for(member):
    """Named regression: run from the repository's root, vLLM logged that triton_kernels.matmul is
    missing.
    """
    found = importlib.util.find_spec("triton_kernels")
    # vLLM's builds for GPUs bring that package from 0.33 on.
    assert found is None or found.name.startswith("vllm.")


def test_settings_that_another_backend_leaves_unread_are_named(monkeypatch):
    from vllm import logger

    from specontext_vllm.engine.backend_choice import warn_of_unread_settings

    said = []
    monkeypatch.setattr(
        logger, "init_logger", lambda name: SimpleNamespace(warning_once=said.append)
    )
    for additional in (None, {}, {"other": 1}):
        warn_of_unread_settings(SimpleNamespace(additional_config=additional))
    assert said == []
    warn_of_unread_settings(SimpleNamespace(additional_config={"specontext": {"budget": 128}}))
    (sentence,) = said
    assert sentence.startswith(
        "additional_config.specontext: found settings, which nothing reads without "
        "--attention-backend specontext"
    )


def attention_config(backend, **kinds):
    named = {kind: SimpleNamespace(name=name) for kind, name in kinds.items()}
    chosen = backend and SimpleNamespace(name=backend)
    return SimpleNamespace(attention_config=SimpleNamespace(backend=chosen, backend_per_kind=named))


def test_our_backend_takes_the_layers_of_full_attention_and_no_others():
    from specontext_vllm.engine.backend_choice import is_selected, take_full_attention

    config = attention_config("SPECONTEXT", sliding_window="TRITON_ATTN")
    for _ in range(2):
        take_full_attention(config)
        chosen = config.attention_config
        assert chosen.backend is None and is_selected(config)
        assert {kind: b.name for kind, b in chosen.backend_per_kind.items()} == {
            "sliding_window": "TRITON_ATTN",
            "full_attention": "SPECONTEXT",
        }
    other = attention_config("FLASH_ATTN", sliding_window="TRITON_ATTN")
    take_full_attention(other)
    assert other.attention_config.backend.name == "FLASH_ATTN" and not is_selected(other)


def test_the_kind_is_one_of_vllm_s():
    from vllm.v1.attention.selector import get_attn_spec_kind

    from specontext_vllm.engine.names import OUR_KIND

    assert get_attn_spec_kind(False, False, "decoder").value == OUR_KIND


def test_layers_of_other_kinds_are_never_ours():
    from specontext_vllm.config import ConfigError
    from specontext_vllm.engine.backend_choice import refuse_other_kinds

    for backend in (None, "FLASH_ATTN", "SPECONTEXT"):
        refuse_other_kinds(attention_config(backend))
    refuse_other_kinds(attention_config("FLASH_ATTN", full_attention="TRITON_ATTN"))
    refuse_other_kinds(attention_config("SPECONTEXT", sliding_window="TRITON_ATTN"))
    refuse_other_kinds(attention_config("FLASH_ATTN", full_attention="SPECONTEXT"))
    for wrong in (
        attention_config("SPECONTEXT", full_attention="CPU_ATTN"),
        attention_config("FLASH_ATTN", sliding_window="SPECONTEXT"),
        attention_config("SPECONTEXT", mla_attention="SPECONTEXT"),
    ):
        with pytest.raises(
            ConfigError,
            match=(
                r"^--attention-config.backend_per_kind: found \{.*; use --attention-backend "
                r"specontext, and name backends of vLLM's for other kinds only\.$"
            ),
        ):
            refuse_other_kinds(wrong)
