"""Heads from the hub: which are known, what is said first, and that offline nothing is asked."""

import re
from types import SimpleNamespace

import pytest
import yaml

from specontext_vllm.config import ConfigError, SpeContextConfig
from specontext_vllm.engine.find_head import find_head
from specontext_vllm.engine.prepare import prepare_vllm_config
from specontext_vllm.retrieval import known_heads
from specontext_vllm.retrieval.checkpoint import HeadError, checkpoint_folder
from specontext_vllm.retrieval.known_heads import KnownHead, known_head
from tests.engine.configs import vllm_config
from tests.engine.conftest import DEMO_MODEL

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40
HEAD = "some/head"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache, as huggingface_hub lays it out, with the demo's head at two commits; `main` is
    the one.
    """
    repo = tmp_path / "hub" / "models--some--head"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for file in (DEMO_MODEL / "retrieval_head").iterdir():
        if file.is_file():
            (repo / "blobs" / file.name).write_bytes(file.read_bytes())
            for commit in (COMMIT, OTHER):
                (repo / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
                (repo / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{file.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repo / "snapshots"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The calls to a hub that has every head and keeps it in the folder of one commit."""
    calls = []

    def snapshot_download(name, **asked):
        calls.append((name, asked))
        folder = tmp_path / COMMIT
        folder.mkdir(exist_ok=True)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return calls


def one_sentence(error):
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and ". " not in text
    return text


def test_a_folder_is_itself_and_a_file_is_refused(tmp_path):
    assert checkpoint_folder(str(tmp_path)) == tmp_path
    (tmp_path / "weights").write_text("")
    with pytest.raises(HeadError, match="is a file"):
        checkpoint_folder(str(tmp_path / "weights"))
    with pytest.raises(
        HeadError, match="is a folder, which has no revision 'main': leave retrieval_head_revision"
    ) as error:
        checkpoint_folder(str(tmp_path), "main")
    one_sentence(error)


@pytest.mark.parametrize("revision", [None, "main", COMMIT, OTHER])
def test_offline_the_cache_is_read_and_no_request_is_made(cache, monkeypatch, revision):
    monkeypatch.setattr(
        "huggingface_hub.HfApi.repo_info", lambda *_, **__: pytest.fail("asked the hub")
    )
    monkeypatch.setattr(
        "huggingface_hub.HfApi.list_repo_tree", lambda *_, **__: pytest.fail("asked the hub")
    )
    said = []
    commit = OTHER if revision == OTHER else COMMIT
    assert checkpoint_folder(HEAD, revision, say=said.append) == cache / commit
    assert not any("taking" in text for text in said)


@pytest.mark.parametrize("name, revision", [(HEAD, "v9"), (HEAD, "a" * 40), ("other/head", None)])
def test_offline_a_miss_is_one_sentence(cache, name, revision):
    with pytest.raises(
        HeadError,
        match=rf"{name} is no folder here, its revision {revision or 'main'} is not in the "
        "Hugging Face cache",
    ) as error:
        checkpoint_folder(name, revision, say=pytest.fail)
    assert "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE" in one_sentence(error)


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_either_switch_is_the_one_that_vllm_reads(switch):
    import os
    import subprocess
    import sys

    env = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")} | {
        switch: "1"
    }
    script = "from huggingface_hub import constants; print(constants.HF_HUB_OFFLINE)"
    assert (
        subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
        ).stdout
        == "True\n"
    )


def test_what_is_taken_from_where_is_said_before_it_is(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://mirror.example")
    said = []

    def say(text):
        said.append((text, len(hub)))

    checkpoint_folder(HEAD, say=say)
    assert said == [
        (
            "Retrieval head: taking some/head from https://mirror.example at revision main, which "
            "is not pinned and may change at any time.",
            0,
        ),
        (
            f"Retrieval head: some/head at main is commit {COMMIT}; retrieval_head_revision "
            "(specontext inspect: --revision) pins it.",
            1,
        ),
    ]
    said.clear()
    checkpoint_folder(HEAD, COMMIT, say=say)
    assert said == [
        (f"Retrieval head: taking some/head from https://mirror.example at revision {COMMIT}.", 1)
    ]


def test_the_hub_is_asked_for_config_and_weights_of_the_revision_only(hub):
    checkpoint_folder(HEAD, "v2", say=lambda _: None)
    [(name, asked)] = hub
    assert (name, asked["revision"], asked["local_files_only"]) == (HEAD, "v2", False)
    assert {"config.json", "*.safetensors"} <= set(asked["allow_patterns"])


def test_what_the_hub_does_not_give_is_one_sentence(monkeypatch):
    def no_route(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_route)
    with pytest.raises(
        HeadError,
        match="some/head is no folder here, and the Hugging Face hub did not provide its revision "
        "main .OSError.",
    ) as error:
        checkpoint_folder(HEAD, say=lambda _: None)
    one_sentence(error)


@pytest.mark.parametrize("name", ["/models/none", "a/b/c", "../head", "so--me/head"])
def test_what_can_be_no_hub_id_is_not_asked_for(hub, name):
    with pytest.raises(
        HeadError, match="is no folder here, and no id on the Hugging Face hub can be called so"
    ) as error:
        checkpoint_folder(name, say=pytest.fail)
    assert one_sentence(error) and not hub


def test_known_heads():
    assert (
        known_head("meta-llama/llama-3.1-8b-instruct").head == "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B"
    )
    assert known_head("Qwen/Qwen3-8B").head == "RedHatAI/Qwen3-8B-speculator.eagle3"
    assert known_head("Qwen3-8B") is None
    assert known_head("/models/Qwen/Qwen3-8B") is None


def test_every_known_head_has_a_source_and_a_revision_is_a_commit():
    entries = yaml.safe_load(known_heads._configs().joinpath("known_heads.yaml").read_text())
    assert all(
        set(entry) - {"revision"} == {"target", "head", "source"}
        and entry["source"].startswith("https://")
        for entry in entries
    )
    assert all(
        re.fullmatch("[0-9a-f]{40}", str(entry.get("revision", COMMIT))) for entry in entries
    )
    targets = [entry["target"].lower() for entry in entries]
    assert len(targets) == len(set(targets))


@pytest.mark.parametrize(
    "pinned, given, wanted",
    [(None, None, "main"), (OTHER, None, OTHER), (OTHER, "v2", "v2"), (None, "v2", "v2")],
)
def test_a_known_head_is_taken_at_the_given_revision_else_the_tables(
    hub, monkeypatch, pinned, given, wanted
):
    monkeypatch.setattr(known_heads, "_heads", lambda: {"some/model": KnownHead(HEAD, pinned)})
    model = SimpleNamespace(model="some/model", hf_config=SimpleNamespace())
    find_head(SpeContextConfig(retrieval_head_revision=given), model)
    assert [(name, asked["revision"]) for name, asked in hub] == [(HEAD, wanted)]


def test_workers_get_the_folder_of_one_commit(cache):
    config = vllm_config(
        {"specontext": {"retrieval_head": HEAD, "retrieval_head_revision": "main"}}
    )
    prepare_vllm_config(config)
    assert config.additional_config["specontext"] == {"retrieval_head": str(cache / COMMIT)}
    (cache.parent / "refs" / "main").write_text(OTHER)
    prepare_vllm_config(config)
    assert config.additional_config["specontext"] == {"retrieval_head": str(cache / COMMIT)}


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (
            {"retrieval_head": "dummy"},
            "retrieval_head_revision: found 'v2' with retrieval_head 'dummy', which no hub holds; "
            "leave it out.",
        ),
        (
            {"retriever": "quest"},
            "retrieval_head_revision: found 'v2' with retriever 'quest' and no retrieval_head; "
            "leave it out.",
        ),
        ({"retrieval_head": str(DEMO_MODEL)}, "is a folder, which has no revision 'v2'"),
        ({}, "is a folder, which has no revision 'v2'"),
    ],
    ids=["dummy", "no-head", "folder", "beside-the-model"],
)
def test_a_revision_without_a_hub_id_is_refused(settings, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        prepare_vllm_config(
            vllm_config({"specontext": {**settings, "retrieval_head_revision": "v2"}})
        )
