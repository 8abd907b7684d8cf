"""The records that travel between stages: small frozen dataclasses of plain values.

A stage never hands another an object of its own; it hands one of these, and every one of them can
be written as JSON. Alignment rule for all per-token streams of a `Sample`: index t is about
predicting `tokens[t]`, so index 0 has weight 0.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aprium.base.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call of a tool; `arguments` is JSON text of an object."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation.

    `reasoning` is the text between the thinking tags of an assistant turn; `tool_call_id` names
    the call that a `tool` turn answers.
    """

    role: str
    content: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """A form that the answer must have; it begins where reasoning, if any, has ended.

    `kind` says what `value` is: "json", a JSON schema (mapping or JSON text); "regex"; "choice", a
    list of strings; "grammar", in Lark's or llama.cpp's notation; "tools", a mapping with `tools`
    in the OpenAI form, `choice` ("auto", "required" or a tool's name), `parallel` (whether several
    may be called) and `answer` (None, or kind and value of another guide that may be followed
    instead of calling). All but text is kept as JSON text. Raises RequestError.
    """

    kind: str
    value: Any

    def __post_init__(self) -> None:
        """Write values as text, check what needs no vocabulary."""
        if self.kind not in GUIDE_KINDS:
            known = ", ".join(GUIDE_KINDS)
            raise RequestError(f"guide kind is {self.kind!r}: use one of {known}", param="guide")
        value = self.value
        if self.kind in ("json", "choice", "tools") and not isinstance(value, str):
            try:
                value = json.dumps(value, ensure_ascii=False, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise RequestError(
                    f"the {self.kind} guide cannot be written as JSON: {error}", param="guide"
                ) from error
        if not isinstance(value, str):
            raise RequestError(f"a {self.kind} guide must be a text", param="guide")
        object.__setattr__(self, "value", value)


GUIDE_KINDS = ("json", "regex", "choice", "grammar", "tools")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the next tokens of one request.

    `temperature` 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 are off. Filters apply in
    the order temperature, top-k, top-p, min-p. `logprobs` asks for that many alternatives at each
    generated position, `prompt_logprobs` likewise for the prompt; 0 gives the chosen token alone.
    `max_tokens` None means up to the model's context. Before `min_tokens` are written no end token,
    stop token or stop string ends the text: the tokens are not chosen, the strings not looked for,
    unless a guide leaves nothing else. `seed` makes one request reproducible
    whatever it is batched with. `n` continuations are given, of `best_of` that are made those with
    the best mean log-probability. With a `guide` only tokens that keep to its form are chosen,
    before the filters apply. Once `thinking_budget` tokens of reasoning are written it is closed at
    the next line break, at the latest after `thinking_grace` more; `thinking_message` is written
    first. `logit_bias`, a mapping or pairs, is added to the logits of tokens before all that, not
    to log-probabilities. Raises RequestError naming the field that is out of range.
    """

    max_tokens: int | None = 256
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    best_of: int | None = None
    guide: Guide | None = None
    thinking_budget: int | None = None
    thinking_grace: int = 500
    thinking_message: str = ""
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        """Normalise sequences to tuples and check ranges."""
        object.__setattr__(self, "logit_bias", _read_bias(self.logit_bias))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, str) else () if value is None else value
            if not isinstance(value, Iterable):
                raise RequestError(f"{name} is {value!r}: it must be a list", param=name)
            object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "top_k", 0 if self.top_k == -1 else self.top_k)
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
                raise RequestError(f"{name} must be a number, not {value!r}", param=name)
            if not low <= value <= high:
                bound = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                raise RequestError(f"{name} is {value}: it must be {bound}", param=name)
        for name in _INTEGERS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                raise RequestError(f"{name} must be an integer, not {value!r}", param=name)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens} and max_tokens is {self.max_tokens}: raise "
                "max_tokens, or ask for fewer",
                param="min_tokens",
            )
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(
                f"best_of is {self.best_of} and n is {self.n}: no more can be chosen than are made",
                param="best_of",
            )
        if self.top_p == 0:
            raise RequestError("top_p is 0: use temperature=0 for greedy decoding", param="top_p")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise RequestError("stop must be non-empty strings", param="stop")
        if any(isinstance(t, bool) or not isinstance(t, int) for t in self.stop_token_ids):
            raise RequestError("stop_token_ids must be integers", param="stop_token_ids")
        if self.guide is not None and not isinstance(self.guide, Guide):
            raise RequestError(f"guide is {self.guide!r}: give Guide(...)", param="guide")
        message = self.thinking_message
        if not isinstance(message, str) or any(tag in message for tag in _TAGS):
            raise RequestError(
                f"thinking_message is {message!r}: it must be a text without the tags that end "
                "reasoning",
                param="thinking_message",
            )


def _read_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Return biases as pairs in the order of ids; raises RequestError for what are none."""
    try:
        pairs = dict(value or ()).items()
        found = tuple(sorted((int(token), float(bias)) for token, bias in pairs))
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(
            "logit_bias must be a mapping from token ids to numbers", param="logit_bias"
        ) from error
    for token, bias in found:
        if not -100 <= bias <= 100:
            raise RequestError(
                f"logit_bias of token {token} is {bias}: it must be between -100 and 100",
                param="logit_bias",
            )
    return found


# Fields that a checkpoint's `generation_config.json` may recommend values for.
RECOMMENDED_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_INTEGERS = (
    *("max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs", "n", "best_of"),
    *("thinking_budget", "thinking_grace"),
)
_TAGS = ("</think>", "<tool_call>")
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_tokens", 0, math.inf),
    ("min_tokens", 0, math.inf),
    ("temperature", 0, 100),
    ("top_p", 0, 1),
    ("top_k", 0, math.inf),
    ("min_p", 0, 1),
    ("seed", -(2**63), 2**63 - 1),
    ("logprobs", 0, 100),
    ("prompt_logprobs", 0, 100),
    ("n", 1, 128),
    ("best_of", 1, 128),
    ("thinking_budget", 0, math.inf),
    ("thinking_grace", 0, math.inf),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to generate: prompt token ids and how to continue them (`params.n` is 1).

    Only requests with the same `cache_salt` share what was computed of their prompts. `generated`
    are tokens of an earlier run that is gone on with. Lower `priority` goes first; requests of one
    priority are served in fair turns by `share`. It is given up `deadline_s` seconds after it came.
    With `follows` it waits until that request, which `leads`, has read the same prompt. Its state
    is kept every `keep_every` generated tokens (0: at the end only). `pooling` makes a vector of
    the prompt's hidden states, the last or the mean of all (of as many tokens as there are). With
    `thinking` the prompt opened the reasoning, so that generation begins inside it.
    """

    id: str
    tokens: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    cache_salt: str = ""
    generated: tuple[int, ...] = ()
    priority: int = 0
    share: str = ""
    deadline_s: float | None = None
    follows: str | None = None
    leads: bool = False
    keep_every: int = 0
    pooling: Literal["last", "mean"] | None = None
    thinking: bool = False


# Alternatives at one position: token id -> natural-log probability, most probable first.
TopLogprobs = Mapping[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds a request spent: waiting for its first step, until its first token, and in all."""

    queue_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one engine step added to a request.

    `tokens` and `logprobs` run in parallel; `top_logprobs` too where alternatives were asked for.
    `prompt_logprobs` comes once, with the first delta, when asked for: entry 0 is None, entry t is
    the log-probability of prompt token t given those before it. `finish` is None while running,
    then "stop", "length" or "abort". `stop_reason` is the stop token id or string that matched, or
    "deadline" for a request that was given up. `embedding` comes with the end where pooling was
    asked for. `weight_version` counts updates of the weights before this step.
    `reused` prompt tokens were known already, and `why_not_more` says why no more (None without a
    prefix cache); `drafted` and `accepted` count drafted tokens that were verified so far, and
    `timings` are those of the request so far.
    """

    id: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: tuple[float | None, ...] | None = None
    prompt_top_logprobs: tuple[TopLogprobs | None, ...] | None = None
    finish: str | None = None
    stop_reason: int | str | None = None
    reused: int = 0
    why_not_more: str | None = None
    drafted: int = 0
    accepted: int = 0
    embedding: tuple[float, ...] | None = None
    weight_version: int = 0
    timings: Timings = field(default_factory=Timings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished (or, while streaming, a growing) continuation of one prompt.

    `tokens` includes the stop token where one ended the text; `text` leaves it and any stop string
    out. `logprobs[i]` is the natural-log probability of `tokens[i]` under the model's own
    distribution (before temperature and filters). `index` tells the n continuations of one prompt
    apart. `finish` is "stop", "length" or "abort", None while streaming. `reused` prompt tokens
    came from the prefix cache, and `why_not_more` says why no more; `drafted` and `accepted` count
    drafted tokens that were verified. `weight_spans` are (version of the weights, tokens) in order.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str | None
    index: int = 0
    prompt_tokens: tuple[int, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: tuple[float | None, ...] | None = None
    prompt_top_logprobs: tuple[TopLogprobs | None, ...] | None = None
    stop_reason: int | str | None = None
    reused: int = 0
    why_not_more: str | None = None
    drafted: int = 0
    accepted: int = 0
    embedding: tuple[float, ...] | None = None
    weight_spans: tuple[tuple[int, int], ...] = ()
    timings: Timings = field(default_factory=Timings)

    @property
    def weight_version(self) -> int:
        """Version of the weights that the last token came from."""
        return self.weight_spans[-1][0] if self.weight_spans else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One episode: what the model read and wrote, token by token, and what that was worth.

    `task` is the identity of the task and `domain` where it belongs. `sampled[t]` says whether the
    model wrote `tokens[t]`, exactly as it came out of it; `logprobs[t]` is then the natural-log
    probability it had, else 0. `reward` comes with its `parts` by name. `stop` is why it ended:
    "done" by the environment, "turns", "tokens" or "deadline" at a limit, "error". An episode that
    failed or ran out of time has `error` and no reward. `weight_spans` are (version of the
    weights, sampled tokens) in order. `defects` are (first token, end, what) of turns in which the
    form was wrong or a call invalid.
    """

    task: str
    domain: str
    tokens: tuple[int, ...]
    sampled: tuple[bool, ...]
    logprobs: tuple[float, ...]
    reward: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    stop: Literal["done", "turns", "tokens", "deadline", "error"] = "done"
    error: str | None = None
    weight_spans: tuple[tuple[int, int], ...] = ()
    num_turns: int = 0
    defects: tuple[tuple[int, int, str], ...] = ()

    def __post_init__(self) -> None:
        """Check that the streams run in parallel and every sampled token has its version."""
        assert len(self.tokens) == len(self.sampled) == len(self.logprobs), "streams must align"
        assert sum(n for _, n in self.weight_spans) == sum(self.sampled), "versions must cover"
        failed = self.stop in ("error", "deadline")
        assert failed == (self.error is not None), "what failed says why, and only that"
        spans = ((begin, end) for begin, end, _ in self.defects)
        assert all(0 <= a <= b <= len(self.tokens) for a, b in spans), "defects are of its tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Episodes of one task, to be compared with each other."""

    task: str
    trajectories: tuple[Trajectory, ...]

    def __post_init__(self) -> None:
        """Check that all are of the one task."""
        assert all(t.task == self.task for t in self.trajectories), "a group has one task"


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    """What a teacher makes of the tokens of a trajectory.

    `logprobs[t]` is the natural-log probability of token t given those before it; `logprobs[0]` is
    0. `top[t]`, where asked for, are its most probable tokens there; `top[0]` is empty.
    """

    teacher: str
    logprobs: tuple[float, ...]
    top: tuple[TopLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One document, conversation or trajectory for the trainer.

    `ce_weight[t]` weighs the cross-entropy of predicting `tokens[t]`. `domain` names the source,
    for per-domain figures. The other streams, empty where a stage has no use for them, are of
    reinforcement learning and distillation: `rl_weight[t]` is how much token t counts in the
    policy's loss, `advantage[t]` what speaks for it. `kl_weight[t]` weighs the teacher, whose
    log-probability of the token is `teacher_logprob[t]` and whose most probable tokens are
    `teacher_top[t]`. `behaviour_logprob[t]` is the log-probability under the weights that wrote it,
    `prox_logprob[t]` under those at the start of the step (empty: the weights as they are).
    Of every stream index 0 is 0.
    """

    tokens: tuple[int, ...]
    ce_weight: tuple[float, ...]
    domain: str = ""
    rl_weight: tuple[float, ...] = ()
    advantage: tuple[float, ...] = ()
    behaviour_logprob: tuple[float, ...] = ()
    prox_logprob: tuple[float, ...] = ()
    kl_weight: tuple[float, ...] = ()
    teacher_logprob: tuple[float, ...] = ()
    teacher_top: tuple[TopLogprobs, ...] = ()

    def __post_init__(self) -> None:
        """Check the alignment rule."""
        assert len(self.tokens) == len(self.ce_weight) > 0, "tokens and weights must align"
        for name in SAMPLE_STREAMS:
            stream = getattr(self, name)
            assert len(stream) in (0, len(self.tokens)), f"{name} must align with the tokens"
            assert not stream or stream[0] == 0.0, "index 0 predicts nothing"
        assert len(self.teacher_top) in (0, len(self.tokens)), "teacher_top must align"


# Streams of a sample, one number a token.
SAMPLE_STREAMS = (
    *("ce_weight", "rl_weight", "advantage", "behaviour_logprob", "prox_logprob"),
    *("kl_weight", "teacher_logprob"),
)
