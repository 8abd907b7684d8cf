"""Talk to the bundled model from Python: a question, a streamed answer, a score.

python examples/chat.py ["What is 27 + 58?"]
"""

import sys

from aprium import LLM, Message, SamplingParams
from aprium.text.parse import parse


def main(question: str) -> None:
    """Ask pico, with thinking and without, and print what it says."""
    with LLM("pico") as llm:
        messages = [Message(role="user", content=question)]
        params = SamplingParams(temperature=0, max_tokens=96)
        printed = ""
        for completion in llm.stream([*messages], params):
            print(completion.text[len(printed) :], end="", flush=True)
            printed = completion.text
        answer = parse(printed, thinking=True)
        print(f"\nreasoning: {answer.reasoning!r}\nanswer: {answer.content!r}")

        options = {"enable_thinking": False}
        (direct,) = llm.generate([messages], params, chat_template_kwargs=options)
        mean = sum(direct.logprobs) / len(direct.logprobs)
        print(f"without thinking: {direct.text!r} (mean log-probability {mean:.2f})")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "What is 27 + 58?")
