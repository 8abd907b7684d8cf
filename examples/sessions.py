"""One conversation, three ways on: fork a session, force a form, resume what was cut off.

python examples/sessions.py
"""

import tempfile
from pathlib import Path

from aprium import LLM, Guide, SamplingParams, Session

WORDS = SamplingParams(temperature=0, max_tokens=32)
AGE = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 120}},
       "required": ["age"], "additionalProperties": False}  # fmt: skip
PLAIN = {"enable_thinking": False}


def main() -> None:
    """Talk, fork, ask for JSON, and go on in what could be another process."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        with LLM("pico", session_dir=directory) as llm:
            session = Session(llm, "plums", messages=[{"role": "system", "content": "Be brief."}])
            first = session.chat("What is 27 + 58?", WORDS, chat_template_kwargs=PLAIN)
            print("asked:", first.text)
            fork = session.fork("other")
            print("one way:", session.chat("Spell plum.", WORDS, chat_template_kwargs=PLAIN).text)
            second = fork.chat("Reverse plum.", WORDS, chat_template_kwargs=PLAIN)
            print(f"another: {second.text} ({second.reused} tokens of the past were known)")
            form = SamplingParams(temperature=0, max_tokens=32, guide=Guide(kind="json", value=AGE))
            print("JSON:", session.chat("How old?", form, chat_template_kwargs=PLAIN).text)
        with LLM("pico", session_dir=directory) as llm:  # as after a restart, or a crash
            again = Session(llm, "plums")
            answer = again.chat("And 1 + 1?", WORDS, chat_template_kwargs=PLAIN)
            print(f"later: {answer.text} ({answer.reused} tokens came from disk)")


if __name__ == "__main__":
    main()
