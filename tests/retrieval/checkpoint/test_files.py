"""Files that are damaged, point elsewhere or hold code."""

import json

import pytest
import torch

from specontext_vllm.retrieval.checkpoint import (
    HeadError,
    read_checkpoint,
)
from tests.retrieval.checkpoint.sentences import assert_one_sentence
from tests.retrieval.eagle3_files import Layout, write_checkpoint


def _remove(name):
    return lambda folder: (folder / name).unlink()


def _overwrite(name, content):
    return lambda folder: (folder / name).write_text(content)


def _cut(name):
    """A download that broke off: the header is whole, the data is not."""

    def damage(folder):
        with (folder / name).open("r+b") as file:
            file.truncate((folder / name).stat().st_size * 3 // 4)

    return damage


FOLDERS = {
    "no_config": (Layout(), _remove("config.json"), "holds no config.json"),
    "broken_config": (Layout(), _overwrite("config.json", "{"), "not valid JSON"),
    "config_is_a_list": (Layout(), _overwrite("config.json", "[]"), "not a JSON object"),
    "no_weights": (
        Layout(),
        _remove("model.safetensors"),
        "neither \\*.safetensors nor pytorch_model.bin",
    ),
    "pickle_without_consent": (
        Layout(storage="bin"),
        lambda folder: None,
        "as a pickle \\(pytorch_model.bin\\).*set additional_config.specontext.allow_pickle",
    ),
    "cut_safetensors": (
        Layout(),
        _cut("model.safetensors"),
        r"model.safetensors cannot be read \(it ends within midlayer\.[\w.]+\.weight\)",
    ),
    "index_without_a_map": (
        Layout(storage="safetensors_sharded"),
        _overwrite("model.safetensors.index.json", json.dumps({"weight_map": None})),
        "has no weight_map of tensor names to file names",
    ),
    "index_with_a_list": (
        Layout(storage="safetensors_sharded"),
        _overwrite(
            "model.safetensors.index.json", json.dumps({"weight_map": ["model.safetensors"]})
        ),
        "has no weight_map",
    ),
    "truncated_safetensors": (Layout(), _overwrite("model.safetensors", "junk"), "cannot be read"),
    "shard_missing": (
        Layout(storage="safetensors_sharded"),
        _remove("model-00002-of-00002.safetensors"),
        "names model-00002-of-00002.safetensors, which is not there",
    ),
    "other_speculator": (
        Layout(),
        _overwrite("config.json", json.dumps({"speculators_model_type": "dflash"})),
        "speculators_model_type 'dflash'",
    ),
    "speculators_without_layer": (
        Layout(),
        _overwrite("config.json", json.dumps({"speculators_model_type": "eagle3"})),
        "no transformer_layer_config",
    ),
}


@pytest.mark.parametrize("layout, damage, sentence", FOLDERS.values(), ids=FOLDERS)
def test_bad_folders_give_one_sentence(tmp_path, layout, damage, sentence):
    damage(write_checkpoint(tmp_path, layout))
    with pytest.raises(HeadError, match=sentence):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "storage, index",
    [
        ("safetensors_sharded", "model.safetensors.index.json"),
        ("bin_sharded", "pytorch_model.bin.index.json"),
    ],
)
@pytest.mark.parametrize(
    "name", ["../secret/{}", "{folder}/secret/{}", "part/../../secret/{}", "secret/..", "a\0{}"]
)
def test_an_index_opens_no_file_outside_its_folder(tmp_path, storage, index, name):
    for folder in ("head", "secret"):
        (tmp_path / folder).mkdir()
        write_checkpoint(tmp_path / folder, Layout(storage=storage))
    weight_map = json.loads((tmp_path / "head" / index).read_text())["weight_map"]
    outside = {tensor: name.format(file, folder=tmp_path) for tensor, file in weight_map.items()}
    (tmp_path / "head" / index).write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(
        HeadError, match=f"{index} names '.*', which is not inside its folder"
    ) as error:
        read_checkpoint(tmp_path / "head", allow_pickle=True)
    assert_one_sentence(error)


def test_a_snapshot_of_the_hub_cache_is_read_through_its_links(tmp_path):
    """Its files are links to ../../blobs, by design of huggingface_hub; shards may also lie in a
    folder of their own.
    """
    snapshot, blobs = tmp_path / "snapshots" / "0a1b", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    layout = Layout(storage="safetensors_sharded")
    write_checkpoint(snapshot, layout)
    whole = read_checkpoint(snapshot)
    index = snapshot / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    moved = dict.fromkeys(weight_map.values())
    (snapshot / "parts").mkdir()
    for name in moved:
        (snapshot / name).rename(blobs / name)
        (snapshot / "parts" / name).symlink_to(f"../../../blobs/{name}")
    index.write_text(
        json.dumps({"weight_map": {tensor: f"parts/{name}" for tensor, name in weight_map.items()}})
    )
    (snapshot / "config.json").rename(blobs / "config")
    (snapshot / "config.json").symlink_to("../../blobs/config")
    linked = read_checkpoint(snapshot)
    assert linked.spec == whole.spec
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in linked.tensors.items())


def test_a_broken_pickle_gives_one_sentence(tmp_path):
    write_checkpoint(tmp_path, Layout(storage="bin"))
    (tmp_path / "pytorch_model.bin").write_text("junk")
    with pytest.raises(HeadError, match="pytorch_model.bin cannot be read") as error:
        read_checkpoint(tmp_path, allow_pickle=True)
    assert_one_sentence(error)


def test_consent_to_a_pickle_does_not_run_it(tmp_path):
    write_checkpoint(tmp_path, Layout(storage="bin"))
    torch.save({"fc.weight": _Touches(tmp_path / "touched")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(HeadError, match="pytorch_model.bin cannot be read"):
        read_checkpoint(tmp_path, allow_pickle=True)
    assert not (tmp_path / "touched").exists()


class _Touches:
    """Unpickled freely, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return type(self.file).touch, (self.file,)
