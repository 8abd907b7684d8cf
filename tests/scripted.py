"""A policy that says what a test wrote, token by token, and remembers what it was shown."""

from collections.abc import Sequence

from aprium.base.records import Completion, Message, SamplingParams
from aprium.envs.dialogue import ChatFormat


class ScriptedPolicy:
    """Gives `replies` in order, each a text, tokens, or an error to raise.

    Every token has log-probability -0.25; the weights' version is the number of the turn. A reply
    longer than `max_tokens` is cut, with finish "length".
    """

    def __init__(self, chat: ChatFormat, replies: Sequence[str | tuple[int, ...] | Exception]):
        self.chat, self.replies = chat, list(replies)
        self.shown: list[tuple[int, ...]] = []
        self.asked: list[SamplingParams] = []

    async def complete(self, tokens: Sequence[int], params: SamplingParams) -> Completion:
        self.shown.append(tuple(tokens))
        self.asked.append(params)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        tokenizer = self.chat.tokenizer
        end = tokenizer.id_of("<|im_end|>")
        ids = (*tokenizer.encode(reply), end) if isinstance(reply, str) else reply
        limit = params.max_tokens
        cut = limit is not None and len(ids) > limit
        ids = ids[:limit] if cut else ids
        return Completion(
            text=tokenizer.decode([i for i in ids if i != end]),
            tokens=ids,
            logprobs=(-0.25,) * len(ids),
            finish="length" if cut else "stop",
            weight_spans=((len(self.shown), len(ids)),),
        )

    async def score(self, tokens: Sequence[int]) -> list[float | None]:
        return [None, *[-0.25] * (len(tokens) - 1)]


def written(chat: ChatFormat, messages: Sequence[Message], reply: Message, tools=()) -> str:
    """Return `reply` as the template writes it after its prompt, without the end token."""
    prompt = chat.template.render(messages, tools, enable_thinking=chat.thinking)
    whole = chat.template.render([*messages, reply], tools, add_generation_prompt=False)
    text = whole.removeprefix(prompt.removesuffix("<think>\n").removesuffix("<think></think>"))
    if chat.thinking:
        text = text.removeprefix("<think>\n").removeprefix("<think>")
    else:
        text = text.removeprefix("<think></think>")
    return text.split("<|im_end|>")[0]
