"""Ask about a long text with `LLM`, and see how much of the KV cache the answer took.

python examples/offline.py
"""

import argparse

import torch
from vllm import LLM, SamplingParams

from specontext_vllm.synthetic.tasks import make_problem


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="models/demo")
    parser.add_argument("--tokens", type=int, default=4000, help="length of the text")
    arguments = parser.parse_args()

    # The demo model brings its head. For yours add "retrieval_head": "HEAD".
    llm = LLM(
        model=arguments.model,
        attention_backend="specontext",
        additional_config={"specontext": {"budget": 512}},
        max_model_len=8192,
        enforce_eager=not torch.cuda.is_available(),  # a CPU has nothing to gain from compiling
    )

    # A made-up text with one fact to find, as chat messages; put your own here.
    problem = make_problem("needle", seed=1, approx_tokens=arguments.tokens, layout="question_last")
    (output,) = llm.chat(problem.messages, SamplingParams(temperature=0, max_tokens=48))

    print("question:", problem.messages[-1]["content"].splitlines()[-1])
    print("answer:  ", output.outputs[0].text.strip())
    print("expected:", problem.answer)
    (stats,) = llm.collective_rpc("specontext_stats")
    print(f"pages read: {stats['pages_read'] / stats['pages_total']:.1%}")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
