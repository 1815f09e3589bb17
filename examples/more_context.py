"""Serve more tokens than the GPU memory for KV holds: host memory stands behind it.

python examples/more_context.py
"""

import argparse

import torch
from vllm import LLM, SamplingParams

from specontext_vllm.synthetic.tasks import make_problem

REQUESTS, TOKENS = 4, 3500


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="models/demo")
    # Room for some 6,400 tokens of the demo model. Leave the cap out to use the whole GPU.
    parser.add_argument("--gpu-kv-gib", type=float, default=0.02)
    parser.add_argument("--host-kv-gib", type=float, default=0.25)
    arguments = parser.parse_args()

    llm = LLM(
        model=arguments.model,
        attention_backend="specontext",
        additional_config={
            "specontext": {
                "budget": 256,
                "gpu_kv_gib": arguments.gpu_kv_gib,
                "host_kv_gib": arguments.host_kv_gib,
            }
        },
        max_model_len=4096,
        max_num_seqs=REQUESTS,  # the number of long requests at once, not more
        enforce_eager=not torch.cuda.is_available(),
    )

    problems = [
        make_problem("needle", seed=seed, approx_tokens=TOKENS, layout="question_last")
        for seed in range(REQUESTS)
    ]
    outputs = llm.chat(
        [problem.messages for problem in problems], SamplingParams(temperature=0, max_tokens=48)
    )

    for problem, output in zip(problems, outputs, strict=True):
        print(f"answer: {output.outputs[0].text.strip()} (expected: {problem.answer})")
    cache = llm.llm_engine.vllm_config.cache_config
    (stats,) = llm.collective_rpc("specontext_stats")
    print(f"{cache.num_gpu_blocks * cache.block_size} tokens fit at once")
    print(f"{stats['resident_layers']} of {stats['num_layers']} layers are whole on the GPU")
    print(f"{stats['hit_rate']:.0%} of the selected pages were there, the rest was fetched")


if __name__ == "__main__":
    main()
