#!/usr/bin/env bash
# Train a retrieval head for a model, look at it, and serve the model with it.
#
#     examples/distill_and_serve.sh MODEL HEAD [options of vllm serve]
#
# HOURS, STEPS and CONTEXT set how long and how far; a run that was stopped goes on.
set -euo pipefail
model=$1 head=$2
shift 2

if [ -n "${STEPS:-}" ]; then length=(--steps "$STEPS"); else length=(--hours "${HOURS:-1}"); fi
specontext distill --model "$model" --data synthetic --out "$head" --context "${CONTEXT:-4096}" "${length[@]}"

specontext inspect "$head" --target "$model"

exec vllm serve "$model" --attention-backend specontext \
    --additional-config "{\"specontext\": {\"retrieval_head\": \"$head\", \"budget\": 512}}" "$@"
