#!/usr/bin/env bash
# One call on a lent GPU machine that starts bare and lives for minutes: unpack what came along, install this tree, run steps.
#
#     OUT=FOLDER bash scripts/on_gpu.sh STEP...      # steps: the functions below; none: only unpack
#
# Archives (.gpu_env/*.tar.xz by ../shared/gpu_env/pack.py) and wheels (.whl/*.whl) are unpacked once a machine. Benchmarks go on from the results
# that are committed, or that an earlier call on the same machine made; logs and new results are left in $OUT.
set -u
: "${OUT:?name a folder for what comes back}"
RESULTS=/tmp/results
WORK=/tmp/bench
mkdir -p "$OUT" "$RESULTS" "$WORK"

for archive in .gpu_env/*.tar.xz; do
    mark=/tmp/unpacked-$(basename "$archive")
    if [ -e "$archive" ] && [ ! -e "$mark" ]; then tar xf "$archive" -C /tmp && touch "$mark"; fi
done
if compgen -G '.whl/*.whl' >/dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/wheels .whl/*.whl
fi
export PYTHONPATH=/tmp/site:/tmp/wheels VLLM_USE_FLASHINFER_SAMPLER=0 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
if [ -d /tmp/site ] && [ $# -gt 0 ]; then
    python3 -m pip install -q --no-index --no-deps --no-build-isolation --upgrade --target /tmp/site . 2>&1 | grep -v WARNING
fi
cp -n benchmarks/results/*-h200.json "$RESULTS" 2>/dev/null
begun=$(mktemp)

# $1: name of the log; then seconds, then a command. Its last lines are shown.
logged() {
    local log=$OUT/$1.log begin=$SECONDS
    timeout "$2" "${@:3}" >"$log" 2>&1
    local code=$?
    tail -n "${TAIL:-25}" "$log" | cut -c1-240
    echo "== $1: exit code $code after $((SECONDS - begin)) s"
}
bench() { logged "$1" "$2" python3 -m benchmarks "${@:3}" --out "$RESULTS"; }
test_files() { logged "$1" "$2" python3 -m pytest -q -p no:cacheprovider --durations=12 "${@:3}"; }

# -- tests
tests() {
    test_files gpu-tests 570 tests/attention tests/kernels tests/residency tests/retrieval tests/engine/test_quest_graphs.py \
        tests/engine/test_compile_cache.py tests/engine/test_exactness.py tests/engine/test_tiers.py tests/engine/test_recall.py
}
ray() { test_files ray 240 tests/engine/test_ray_executor.py; }
xformers() { test_files xformers 200 tests/attention; }
two_gpus() { test_files two-gpus 400 tests/engine/test_tensor_parallel.py; }

# -- two tiers
capacity() { bench capacity 580 capacity --work "$WORK" --engine-seconds 330; }
full_memory() { bench capacity-full 580 capacity --gpu-gib 0 --turnover 0.05 --work "$WORK" --engine-seconds 400; }
link() { bench link 200 link; }
decode() { bench decode 400 decode --work "$WORK"; }

# -- speed
steps() { bench speed-steps 590 speed steps --engines specontext,stock --engine-seconds 240 --work "$WORK"; }
others() { bench speed-others 590 speed steps --engines quest,hf-sdpa,hf-eager --engine-seconds 190 --work "$WORK"; }
paper() { bench speed-paper 590 speed paper --engine-seconds 190 --work "$WORK"; }
edge() { bench speed-edge 500 speed edge --engine-seconds 180 --work "$WORK"; }
serve_long_prompts() { bench serve-long 590 speed serve --lengths 8k/1k,32k/4k --concurrency 24 --engine-seconds 290 --work "$WORK"; }
serve_long_answers() { bench serve-answers 590 speed serve --lengths 1k/16k --concurrency 24 --engine-seconds 290 --work "$WORK"; }
serve_few() { bench serve-few 590 speed serve --lengths 8k/1k,32k/4k --concurrency 1,8 --engine-seconds 290 --work "$WORK"; }

# -- accuracy, distillation, soak
larger() {
    logged larger 590 python3 -m specontext_vllm.demo.train --size larger --out /tmp/larger --minutes 9.5
    cp /tmp/larger/training_log.txt "$OUT"
}
GRID=(--prompts 24 --contexts 4096,8192 --budgets 64,128,256,512,1024 --tasks single,multi_key,multi_query,one_value,recitation,perplexity)
accuracy_larger() { bench accuracy-larger 590 accuracy --model /tmp/larger "${GRID[@]}" --work "$WORK/accuracy-larger"; }
accuracy_demo() { bench accuracy-demo 590 accuracy "${GRID[@]}" --thresholds 0.1,0.15,0.2,0.3,0.5 --work "$WORK/accuracy-demo"; }
distill() { bench distill 400 distill; }
soak() { bench "soak-${ENGINE:-one-tier}" 595 soak --model-shape 8b --engines "${ENGINE:-one-tier}" --requests 1000000 --seconds "${SECONDS_OF_LOAD:-300}" --work "$WORK/soak"; }

for step in "$@"; do "$step"; done
find "$RESULTS" -type f -newer "$begun" -exec cp {} "$OUT" \;
