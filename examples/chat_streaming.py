"""Chat with a running server, and print the answer as it comes.

    vllm serve models/demo --config configs/demo.yaml       # on a CPU: --enforce-eager
    python examples/chat_streaming.py "What is the code of Anna?" --file text.txt

Nothing here is special to specontext: any client of OpenAI's API does.
"""

import argparse
from pathlib import Path

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("question")
    parser.add_argument("--file", type=Path, help="text to ask about")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    arguments = parser.parse_args()

    client = OpenAI(base_url=f"{arguments.url}/v1", api_key="none")
    model = client.models.list().data[0].id
    text = arguments.file.read_text() + "\n" if arguments.file else ""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text + arguments.question}],
        temperature=0,
        max_tokens=64,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
