"""What may come next in a sequence: the grammar its answer keeps to, and when its reasoning ends.

A `SequenceGuide` says which tokens may follow, as bit masks that the runner lays over the logits.
What it says is a function of the request and the tokens generated: the same after a preemption,
whatever was drafted, and for a new one that the tokens are pushed into. Where a prompt opened the
reasoning, the grammar begins with it: free text up to the closing tag, without an end token.
A budget closes reasoning by masks that leave one token, so it combines with grammars and drafts.

Grammars are those of llguidance: of what may follow it computes only what is asked for, so that a
schema needs no compilation worth the name. No torch.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import llguidance

from aprium.base.errors import RequestError
from aprium.base.records import Guide, SamplingParams
from aprium.text.parse import ReasoningEnd
from aprium.text.tokenizer import Tokenizer
from aprium.text.tool_grammar import WHITESPACE, Level, reasoning_rule, tool_grammar

_KEPT = 64  # compiled grammars


class Grammars:
    """The grammars of one vocabulary; safe to share between threads.

    `vocab_size` is the model's, which may be more than the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[Guide, bool], llguidance.LLMatcher] = OrderedDict()
        self._tag = tuple(tokenizer.encode("</think>"))

    @property
    def vocabulary(self) -> llguidance.LLTokenizer:
        """The vocabulary as the library wants it, made on first use."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = llguidance.LLTokenizer(
                    llguidance.TokenizerWrapper(_Words(self._tokenizer, self._vocab_size)),
                    n_vocab=self._vocab_size,
                    eos_token=list(self._tokenizer.eos_token_ids) or [0],
                )
            return self._vocabulary

    def check(self, params: SamplingParams, thinking: bool) -> None:
        """Raise RequestError with the library's words when the guide of `params` is none."""
        if params.guide is not None:
            self._matcher(params.guide, thinking)

    def start(
        self, params: SamplingParams, thinking: bool, generated: Sequence[int] = ()
    ) -> "SequenceGuide | None":
        """Return the guide of a sequence, None where nothing is to be guided.

        `thinking`: its prompt opened the reasoning; `generated` are the tokens there are of it.
        Raises RequestError as `check` does.
        """
        if params.guide is None and not thinking:
            return None
        matcher = self._matcher(params.guide, thinking) if params.guide is not None else None
        reasoning = None
        if thinking:
            reasoning = _Reasoning(
                closing=(*self._tokenizer.encode(params.thinking_message), *self._tag),
                tag=self._tag,
                end=ReasoningEnd(_tool_names(params.guide)),
                tokenizer=self._tokenizer,
                budget=params.thinking_budget,
                grace=params.thinking_grace,
            )
        ends = self._tokenizer.eos_token_ids
        guide = SequenceGuide(
            matcher,
            reasoning,
            vocab_size=self._vocab_size,
            ends=frozenset(ends),
            may_end=bool(ends) and not params.ignore_eos,
        )
        for token in generated:
            guide.push(token)
        return guide

    def _matcher(self, guide: Guide, thinking: bool) -> llguidance.LLMatcher:
        """Return a matcher of the whole answer that nothing was put into; not to be changed."""
        key = (guide, thinking)
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
        if guide.kind == "tools":
            matcher = self._compile_tools(guide, thinking)
        else:
            lead = '("\\n" "\\n"?)? ' if guide.kind == "json" else ""
            texts = _sub_grammars(guide)
            if thinking:
                top = f"start: reason {lead}@answer\n{reasoning_rule()}"
                texts = [{"name": "top", "lark_grammar": top}, *texts]
            matcher = self._compile(texts, guide.kind)
        with self._lock:
            self._compiled[key] = matcher
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return matcher

    def _compile(self, grammars: list[dict[str, Any]], kind: str) -> llguidance.LLMatcher:
        text = json.dumps({"grammars": grammars})
        matcher = llguidance.LLMatcher(self.vocabulary, text, log_level=0)
        if matcher.is_error():
            raise _refusal(kind, matcher.get_error())
        return matcher

    def _compile_tools(self, guide: Guide, thinking: bool) -> llguidance.LLMatcher:
        """Compile a tools guide, loosening the schemas of tools that are not strict as needed."""
        value = _tools_of(guide)
        tools, choice = value["tools"], value.get("choice", "auto")
        named = [t for t in tools if t.get("function", t)["name"] == choice]
        tools = named or tools
        answer = value.get("answer")
        below = _sub_grammars(Guide(**answer)) if answer else []

        def compiled(some: Sequence[Any], levels: Sequence[Level]) -> llguidance.LLMatcher:
            top = tool_grammar(
                some,
                required=choice != "auto",
                parallel=value.get("parallel", True),
                thinking=thinking,
                answer=bool(answer),
                levels=levels,
            )
            return self._compile([{"name": "top", "lark_grammar": top}, *below], "tools")

        levels = [Level.STRICT] * len(tools)
        try:
            return compiled(tools, levels)
        except RequestError:
            if answer:
                self._compile(below, answer["kind"])  # so that the error says which it is
        for i, tool in enumerate(tools):
            strict = tool.get("function", tool).get("strict") is True
            for level in (Level.STRICT,) if strict else Level:
                levels[i] = level
                try:
                    compiled([tool], [level])
                    break
                except RequestError as error:
                    if strict or level == Level.TYPES:
                        name = tool.get("function", tool)["name"]
                        raise RequestError(f"tool {name!r}: {error}", param="tools") from error
        return compiled(tools, levels)


class _Thought(NamedTuple):
    """Where a sequence is in its reasoning.

    `tail` are its last bytes, `count` its tokens before any of the closing ones, of which `written`
    are there; `line_end`: the last token has a line break.
    """

    open: bool = True
    tail: bytes = b""
    count: int = 0
    line_end: bool = False
    written: int = 0


class _Reasoning:
    """The rule that ends reasoning: on its own, or by the tokens `closing`, which end in `tag`."""

    def __init__(
        self,
        *,
        closing: tuple[int, ...],
        tag: tuple[int, ...],
        end: ReasoningEnd,
        tokenizer: Tokenizer,
        budget: int | None,
        grace: int,
    ) -> None:
        self.tag, self.budget, self.grace = tag, budget, grace
        self._closing, self._end, self._tokenizer = closing, end, tokenizer

    def forced(self, thought: _Thought) -> int | None:
        """Return the only token that may follow, None while others may."""
        if not thought.open:
            return None
        if not thought.written:
            count, budget = thought.count, self.budget
            if budget is None or count < budget:
                return None
            if count and not thought.line_end and count < budget + self.grace:
                return None
        return self._closing[thought.written]

    def follow(self, thought: _Thought, token: int) -> _Thought:
        """Return where the sequence is after `token`."""
        if not thought.open:
            return thought
        if self.forced(thought) == token:
            written = thought.written + 1
            return thought._replace(written=written, open=written < len(self._closing))
        new = self._tokenizer.token_bytes(token)
        tail, ended = self._end.push(thought.tail, new)
        return thought._replace(
            open=not ended, tail=tail, count=thought.count + 1, line_end=b"\n" in new
        )


class SequenceGuide:
    """What may come next in one sequence.

    `complete`: the grammar has been followed to its end and nothing may come any more. `error`
    says why the grammar cannot be followed further, None while it can.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher | None,
        reasoning: _Reasoning | None,
        *,
        vocab_size: int,
        ends: frozenset[int],
        may_end: bool,
    ) -> None:
        self._start, self._reasoning = matcher, reasoning
        self._matcher = matcher.deep_copy() if matcher is not None else None
        self._thought = _Thought(open=reasoning is not None)
        self._num_bytes = -(-vocab_size // 8)
        self._ends, self._may_end = ends, may_end
        self.error: str | None = None

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher is not None and self._matcher.is_stopped() and self.error is None

    def masks(self, drafts: Sequence[int] = ()) -> tuple[bytes | None, ...]:
        """Return what may follow the tokens so far, and each of `drafts` after them.

        One mask a position, up to the first draft that may not stand there or ends the sequence;
        bit i of a mask (of byte i // 8, lowest first) is token i, and None lets all follow.
        """
        thought, matcher = self._thought, self._matcher
        masks = [self._mask(thought, matcher)]
        fed = 0
        for draft in drafts:
            mask = masks[-1]
            if mask is not None and not mask[draft // 8] >> draft % 8 & 1:
                break
            ends = self._may_end and draft in self._ends
            if ends or (matcher is not None and matcher.is_stopped()):
                masks.append(None)  # of a choice that nobody will look at
                break
            own = matcher is self._matcher
            thought, matcher, taken = self._follow(thought, matcher, draft)
            fed += taken if own else 0
            masks.append(self._mask(thought, matcher))
        if fed and self._matcher is not None:
            self._matcher.rollback(fed)
        return tuple(masks)

    def push(self, token: int) -> None:
        """Take the next token of the sequence, which is none that ends it."""
        self._thought, self._matcher, _ = self._follow(self._thought, self._matcher, token)
        if self._matcher is not None and self._matcher.is_error():
            self.error = self._matcher.get_error()

    def finish_thinking(self) -> bool:
        """Close the reasoning at the next token; False where there is none to close."""
        if self._reasoning is None or not self._thought.open:
            return False
        self._reasoning.budget, self._reasoning.grace = self._thought.count, 0
        return True

    def _forced(self, thought: _Thought) -> int | None:
        return self._reasoning.forced(thought) if self._reasoning is not None else None

    def _mask(self, thought: _Thought, matcher: llguidance.LLMatcher | None) -> bytes | None:
        """Return what may follow, from a matcher that is not changed by it."""
        forced = self._forced(thought)
        if forced is not None:
            only = bytearray(self._num_bytes)
            only[forced // 8] = 1 << forced % 8
            return bytes(only)
        if matcher is None or matcher.is_stopped():
            return None
        bits = matcher.compute_bitmask()
        if not self._may_end:
            rest = bytearray(bits)
            for end in self._ends:
                rest[end // 8] &= ~(1 << end % 8)
            bits = bytes(rest)
        if matcher.is_error() or not any(bits):
            self.error = matcher.get_error() or "nothing can follow"
            return None
        return bits

    def _follow(
        self, thought: _Thought, matcher: llguidance.LLMatcher | None, token: int
    ) -> tuple[_Thought, llguidance.LLMatcher | None, int]:
        """Return where the sequence is after `token`, and how many tokens `matcher` took."""
        forced = self._forced(thought) == token
        if self._reasoning is not None:
            thought = self._reasoning.follow(thought, token)
        if matcher is None:
            return thought, None, 0
        if not forced:
            matcher.consume_token(token)
            return thought, matcher, 1
        if thought.open:
            return thought, matcher, 0
        # What was thought does not matter to the grammar, and may have been cut off within a
        # character, which it could not go on from.
        assert self._start is not None and self._reasoning is not None
        fresh = self._start.deep_copy()
        fresh.consume_tokens(list(self._reasoning.tag))
        return thought, fresh, 0


class _Words:
    """A tokenizer as the library asks for it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = (*tokenizer.eos_token_ids, 0)[0]
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)

    def __call__(self, text: bytes | str) -> list[int]:
        """Return the ids of `text`."""
        return self._tokenizer.encode(text.decode() if isinstance(text, bytes) else text)


def _sub_grammars(guide: Guide) -> list[dict[str, Any]]:
    """Return the grammars of a guide that is none of tools, the first called "answer"."""
    if guide.kind == "json":
        schema = _parse(guide)
        if not isinstance(schema, dict):
            raise _refusal("json", f"{guide.value[:80]!r} is no schema object")
        options = {"whitespace_pattern": WHITESPACE, **schema.get("x-guidance", {})}
        return [{"name": "answer", "json_schema": {**schema, "x-guidance": options}}]
    if guide.kind == "choice":
        texts = _parse(guide)
        if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
            raise _refusal("choice", f"{guide.value[:80]!r} is no list of texts")
        if not texts:
            raise _refusal("choice", "there is nothing to choose from")
        options = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return [{"name": "answer", "lark_grammar": f"start: {options}"}]
    if guide.kind == "regex":
        return [{"name": "answer", "lark_grammar": f"start: /{_in_lark(guide.value)}/"}]
    text = guide.value
    if "::=" in text:  # llama.cpp's notation
        try:
            text = llguidance.grammar_from("gbnf", text)
        except ValueError as error:
            raise _refusal("grammar", error) from error
    return [{"name": "answer", "lark_grammar": text}]


def _in_lark(regex: str) -> str:
    return llguidance.regex_to_lark(regex, "d")


def _parse(guide: Guide) -> Any:
    try:
        return json.loads(guide.value)
    except (ValueError, RecursionError) as error:
        raise _refusal(guide.kind, f"it is not JSON: {error}") from error


def _refusal(kind: str, why: object) -> RequestError:
    return RequestError(f"the {kind} guide cannot be used: {why}", param="guide")


def _tools_of(guide: Guide) -> dict[str, Any]:
    value = _parse(guide)
    tools = value.get("tools") if isinstance(value, dict) else None
    names = [_name_of(tool) for tool in tools] if isinstance(tools, list) else []
    if not names or None in names:
        raise _refusal("tools", "there are none in the OpenAI form")
    if value.get("choice", "auto") not in ("auto", "required", *names):
        raise RequestError(
            f"the tool to be called is {value['choice']!r}: use auto, required or one of "
            f"{', '.join(map(str, names))}",
            param="tool_choice",
        )
    return value


def _name_of(tool: Any) -> str | None:
    function = tool.get("function", tool) if isinstance(tool, dict) else {}
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _tool_names(guide: Guide | None) -> list[str]:
    """Return the names of the tools that may be called, of which a call ends reasoning."""
    if guide is None or guide.kind != "tools":
        return []
    value = _tools_of(guide)
    names = [str(_name_of(tool)) for tool in value["tools"]]
    choice = value.get("choice", "auto")
    return [choice] if choice in names else names
