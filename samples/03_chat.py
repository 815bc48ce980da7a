"""Hold a conversation: the caller keeps the history, the model answers its last message.

The small model knows Python's documentation and was never taught to chat: this shows the calls, use an
instruction-tuned Gemma for answers. Run 01_export.py first.

usage: python samples/03_chat.py [BUNDLE]
"""

import sys

import gemma_deploy
from gemma_deploy.errors import GemmaDeployError

QUESTIONS = ["What is a generator?", "And an iterator?"]


def main() -> None:
    """Ask the bundle given, by default build/tiny-gemma-bundle."""
    path = sys.argv[1] if len(sys.argv) > 1 else "build/tiny-gemma-bundle"
    messages: list[dict[str, str]] = []
    with gemma_deploy.load(path) as model:
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            stream = model.chat(messages, max_new_tokens=40)
            print(f"user: {question}\nmodel: ", end="")
            for piece in stream:
                print(piece, end="", flush=True)
            print()
            messages.append({"role": "assistant", "content": stream.result.text})


if __name__ == "__main__":
    try:
        main()
    except GemmaDeployError as err:
        sys.exit(f"{err}\nThe bundle that these samples use is written by 01_export.py.")
