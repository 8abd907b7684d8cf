"""How long a step takes: a roofline by phase and part of the model, with few fitted constants.

A step computes T packed tokens of S sequences. Its parts run one after the other, each as long as
its bytes at a share of the memory's bandwidth or its operations at a share of the peak: dense
weights, routed experts (more of them the more tokens there are), recurrent states (read and
written), keys and values, activations. Every layer has a floor (launches, synchronisation), every
collective a latency and its bytes. The same function is the device of the simulator. Seconds
throughout. The constants are in `tables/constants.toml`, the rows they come from in
`tables/published.toml`; the same for all models, devices and engines.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from aprium.base.config import from_dict
from aprium.plan.data import merged
from aprium.plan.hardware import Device
from aprium.plan.memory import Deployment, caches, keeps_snapshots, shard
from aprium.plan.shapes import Layer, Shape, Weight

# Mean tokens a verification step yields with so many drafts: accepted ones and the one chosen.
# Lightning's prediction head; synthetic targets in NVIDIA's Dynamo recipes. Between, linear.
_ACCEPTED = {0: 1.0, 1: 1.83, 3: 2.874, 5: 3.421, 7: 3.687}
_MEMO = 1 << 16  # times of steps remembered
_NETWORK_LATENCY = 2.0  # of collectives between hosts, in latencies within one
_LAYER_SHARE = {"pair": 2.0}  # floors and collectives of a layer that is attention and experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """The fitted constants.

    `bandwidth` and `compute` are shares of the data sheet's, `link` of a link's; `layer_us` and
    `collective_us` microseconds; `imbalance` the fullest rank's share of expert work under expert
    parallelism over the mean; `distinct` the share of tokens after the first that choose
    experts independently; `expert_us` what an expert with any token costs beside its bytes;
    `sequence_us` the host's work for a sequence and step; `cpu_*` are those of CPUs.
    """

    bandwidth: float
    compute: float
    layer_us: float
    collective_us: float
    link: float
    imbalance: float
    distinct: float
    sequence_us: float
    expert_us: float
    cpu_bandwidth: float
    cpu_compute: float
    cpu_layer_us: float


def constants(overrides: dict[str, dict[str, Any]] | None = None) -> Constants:
    """Return the constants, a user's values put over the package's."""
    return from_dict(Constants, merged("constants", overrides or {})["value"], where="constants")


def range_factor(overrides: dict[str, dict[str, Any]] | None = None) -> float:
    """Return the factor either way within which nine of ten calibration rows lie."""
    return float(merged("constants", overrides or {})["range"]["factor"])


def accepted_tokens(drafts: int, acceptance: float | None = None) -> float:
    """Return the mean tokens of a verification step: (1 - a^(D+1)) / (1 - a), or the table's."""
    if acceptance is not None:
        if acceptance >= 1:
            return drafts + 1.0
        return (1 - acceptance ** (drafts + 1)) / (1 - acceptance)
    keys = sorted(_ACCEPTED)
    low = max(k for k in keys if k <= drafts)
    high = min((k for k in keys if k >= drafts), default=low)
    if high == low:
        return _ACCEPTED[low]
    weight = (drafts - low) / (high - low)
    return _ACCEPTED[low] * (1 - weight) + _ACCEPTED[high] * weight


class CostModel:
    """The time of a step of one replica, as a function of what the step computes.

    All counts given to `step` are those of one attention rank; expert work adds up over ranks.
    """

    def __init__(
        self, shape: Shape, device: Device, deployment: Deployment, values: Constants
    ) -> None:
        self.shape, self.device, self.deployment, self.values = shape, device, deployment, values
        cpu = device.kind == "cpu"
        share = values.cpu_bandwidth if cpu else values.bandwidth
        self._memory = share * device.bandwidth  # bytes a second
        self._compute = values.cpu_compute if cpu else values.compute
        self._dense_bytes, self._dense_s = self._dense(shape.layers, shape.ends)
        self._experts(shape.layers)
        self.kv_bytes, self.kv_fixed, self.state_bytes = caches(shape.layers, shape, deployment)
        index = sum(layer.index_bytes for layer in shape.layers)
        self._index_bytes = index
        tops = [layer.kv_top for layer in shape.layers if layer.kv_top]
        self._top = min(tops) if tops and deployment.attention != "dense" else None
        tp, bf16 = deployment.tp, self._compute * device.peak("bf16")
        self._pair_s = sum(4 * layer.query_width for layer in shape.layers) / tp / bf16
        self._index_pair_s = sum(layer.index_ops for layer in shape.layers) / tp / bf16
        self._scan_s = sum(layer.scan_ops for layer in shape.layers) / tp / bf16
        head = next((w for w in shape.ends if w.role == "head"), None)
        self._head_s = 2 * shape.vocab * shape.hidden / tp
        self._head_s /= self._compute * device.peak(head.format if head else "bf16")
        activations = sum(4 * layer.inner / tp + 10 * shape.hidden for layer in shape.layers)
        self._activation_bytes = activations
        self._parts = sum(_LAYER_SHARE.get(layer.kind, 1.0) for layer in shape.layers)
        self._layer_s = 1e-6 * (values.cpu_layer_us if cpu else values.layer_us)
        self._floor_s = self._parts * self._layer_s
        self._snapshots = deployment.drafts * keeps_snapshots(device, deployment)
        self._sequence_s = 0.0 if cpu else values.sequence_us * 1e-6
        self._collectives()
        self._memo: dict[tuple[float, float, float], float] = {}
        self._draft = self._draft_costs() if deployment.drafts else (0.0, 0.0)

    def _dense(self, layers: tuple[Layer, ...], ends: tuple[Weight, ...]) -> tuple[float, float]:
        """Return bytes of one rank's weights that every token uses, and seconds a token."""
        num_bytes = seconds = 0.0

        def count(weight: Weight, layer: Layer | None) -> None:
            nonlocal num_bytes, seconds
            part = shard(weight, layer, self.shape, self.deployment)
            num_bytes += weight.num_bytes * part
            if weight.role not in ("norms", "head"):
                peak = self._compute * self.device.peak(weight.format)
                seconds += 2 * weight.params * part / peak

        for weight in ends:
            if weight.role != "embedding":
                count(weight, None)
        for layer in layers:
            for weight in layer.weights:
                if weight.role != "routed experts":
                    count(weight, layer)
        return num_bytes, seconds

    def _experts(self, layers: tuple[Layer, ...]) -> None:
        shape, deployment = self.shape, self.deployment
        ranks = deployment.tp * deployment.dp
        routed = [w for layer in layers for w in layer.weights if w.role == "routed experts"]
        each = 0.0 if self.device.kind == "cpu" else self.values.expert_us * 1e-6
        self._reach_s = each * len(routed) / (ranks if deployment.ep else 1)
        uneven = self.values.imbalance if deployment.ep and ranks > 1 else 1.0
        total = sum(w.num_bytes for w in routed)
        self._expert_bytes = total / shape.experts / ranks * uneven  # one expert of every layer
        self._expert_s = sum(
            2 * w.params / (self._compute * self.device.peak(w.format)) for w in routed
        )
        self._expert_s *= shape.active / shape.experts / ranks * uneven  # a token of one rank
        held = total / ranks / deployment.pp
        away = min(deployment.offload_gb * 1e9 / held, 1.0) if held else 0.0
        device = self.device
        host = max(device.host_link_gb_s * 1e9 * self.values.link, 1.0)
        near = device.host_bandwidth_tb_s * 1e12 * self.values.cpu_bandwidth
        if device.host_link_gb_s < device.host_bandwidth_tb_s * 1e3:
            host = max(host, near)  # the host computes where its memory is
        self._away_s = away * (1 / host - 1 / self._memory)  # more, for a byte of experts

    def _collectives(self) -> None:
        """Set seconds a step and seconds a token of what ranks tell each other."""
        shape, deployment, device = self.shape, self.deployment, self.device
        tp, dp = deployment.tp, deployment.dp
        latency = self.values.collective_us * 1e-6
        fixed = token = 0.0
        if tp > 1:
            rate, slow = self._link(tp)
            fixed += self._parts * latency * slow * (1 + math.log2(tp) / 3) / 2
            token += self._parts * 2 * (tp - 1) / tp * shape.hidden * 2 / rate
        if dp > 1:
            ranks = tp * dp
            rate, slow = self._link(ranks)
            moe = shape.num_moe_layers
            gather = 2 * (ranks - 1)
            reached = ranks * (1 - (1 - 1 / ranks) ** shape.active)
            fixed += moe * 2 * latency * slow
            token += moe * min(gather, 2 * reached) * shape.expert_dim * 2 / rate
        if deployment.pp > 1:
            crosses = tp * dp * deployment.pp > device.domain
            rate = device.network_gb_s if crosses else device.link_gb_s
            hops = deployment.pp - 1
            fixed += hops * latency * (_NETWORK_LATENCY if crosses else 1)
            token += hops * shape.hidden * 2 / (rate * 1e9 * self.values.link)
        self._comm_s, self._comm_token_s = fixed, token

    def _link(self, ranks: int) -> tuple[float, float]:
        """Return bytes a second between `ranks` devices, and how many latencies one takes."""
        device = self.device
        if ranks > device.domain:
            return device.network_gb_s * 1e9 * self.values.link, _NETWORK_LATENCY
        return device.link_gb_s * 1e9 * self.values.link, 1.0

    def _draft_costs(self) -> tuple[float, float]:
        """Return seconds of drafting one token whatever the batch, and the bytes of one expert."""
        shape = self.shape
        head = tuple(w for w in shape.ends if w.role == "head") + shape.head_extra
        num_bytes, _ = self._dense(shape.head_layers, head)
        routed = [w for la in shape.head_layers for w in la.weights if w.role == "routed experts"]
        ranks = self.deployment.tp * self.deployment.dp
        each = sum(w.num_bytes for w in routed) / shape.experts / ranks
        parts = sum(_LAYER_SHARE.get(layer.kind, 1.0) for layer in shape.head_layers) + 1
        comm = self._comm_s / max(self._parts, 1) * parts
        return num_bytes / self._memory + parts * self._layer_s + comm, each

    def cover(self, tokens: float) -> float:
        """Return how many experts of a layer `tokens` tokens reach."""
        shape = self.shape
        spread = tokens if tokens <= 1 else 1 + self.values.distinct * (tokens - 1)
        return shape.experts * (1 - (1 - shape.active / shape.experts) ** spread)

    def step(
        self,
        tokens: float,
        sequences: float,
        context: float,
        pairs: float,
        *,
        samples: float | None = None,
    ) -> float:
        """Return the seconds of one step of all stages.

        `tokens` packed tokens of `sequences`, whose contexts add up to `context`; `pairs` are
        (token, earlier token) pairs; `samples` rows go to the vocabulary (default: one a sequence).
        """
        key = tokens, sequences, sequences if samples is None else samples
        fixed = self._memo.get(key)
        if fixed is None:
            if len(self._memo) >= _MEMO:
                self._memo.clear()
            fixed = self._memo[key] = self._fixed(*key)
        if not sequences:
            return fixed
        kv, work = self.kv_bytes * context, pairs * self._pair_s
        if self._top is not None:
            dense = self.kv_bytes - self._index_bytes
            seen = min(context, sequences * self._top)
            kv = dense * seen + self._index_bytes * context
            share = min(1.0, self._top * sequences / context) if context else 1.0
            work = pairs * (share * self._pair_s + self._index_pair_s)
        reading = kv / self._memory
        return fixed + (reading if reading > work else work)

    def _fixed(self, tokens: float, sequences: float, samples: float) -> float:
        """Return the seconds of a step but for what depends on the contexts."""
        memory, dp = self._memory, self.deployment.dp
        expert_bytes = self._expert_bytes * self.cover(tokens * dp)
        seconds = max(self._dense_bytes / memory, tokens * self._dense_s)
        seconds += max(expert_bytes / memory, tokens * dp * self._expert_s)
        seconds += expert_bytes * self._away_s
        seconds += self._reach_s * self.cover(tokens * dp)
        writes = 1 + self._snapshots * (tokens > sequences)
        moved = sequences * (self.state_bytes * (1 + writes) + self.kv_fixed)
        seconds += moved / memory
        seconds += tokens * (self._activation_bytes / memory + self._scan_s + self._comm_token_s)
        seconds += samples * self._head_s + sequences * self._sequence_s
        return seconds + self._floor_s + self._comm_s

    def decode(self, sequences: float, context: float) -> float:
        """Return the seconds in which `sequences` of mean length `context` each take one step.

        With drafts a step verifies 1 + D positions a sequence and drafts D more.
        """
        drafts = self.deployment.drafts
        tokens = sequences * (1 + drafts)
        total = sequences * context
        if not drafts:
            return self.step(tokens, sequences, total, total)
        seconds = self.step(tokens, sequences, total, total * (1 + drafts), samples=tokens)
        return seconds + self.drafting(sequences)

    def drafting(self, sequences: float) -> float:
        """Return the seconds of drafting for `sequences` after a step."""
        fixed, expert = self._draft
        reached = self.cover(sequences * self.deployment.dp)
        return self.deployment.drafts * (fixed + expert * reached / self._memory)

    def mixed(self, sequences: float, context: float, chunk: float, before: float) -> float:
        """Return the seconds of a step that decodes `sequences` and reads `chunk` prompt tokens.

        `before` tokens of the prompt were read earlier.
        """
        drafts = self.deployment.drafts
        tokens = sequences * (1 + drafts) + chunk
        total = sequences * context
        pairs = total * (1 + drafts) + chunk * (before + chunk / 2)
        seconds = self.step(
            tokens,
            sequences + 1,
            total + before + chunk,
            pairs,
            samples=sequences * (1 + drafts) + 1,
        )
        return seconds + (self.drafting(sequences + 1) if drafts else 0.0)

    def prefill(self, tokens: int, before: int = 0) -> float:
        """Return the seconds of reading a prompt of `tokens` alone, after `before` known ones."""
        seconds, done, most = 0.0, 0, self.deployment.max_batched_tokens
        while done < tokens:
            chunk = min(most, tokens - done)
            at = before + done
            seconds += self.step(
                chunk,
                1,
                at + chunk,
                chunk * (at + chunk / 2),
                samples=float(done + chunk == tokens),
            )
            done += chunk
        return seconds

    def yielded(self) -> float:
        """Return the mean tokens that a decode step gives a sequence."""
        return accepted_tokens(self.deployment.drafts, self.deployment.acceptance)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Steady service of a closed loop of users. Rates are of the whole deployment.

    `running` sequences decode at once; `step_s` is a plain decode step, `decode_tokens_per_s` what
    all users get while nobody's prompt is read, `tpot_s` the mean time
    between a user's tokens, prompt reading of others included; `ttft_s` until the first token.
    """

    output_tokens_per_s: float
    decode_tokens_per_s: float
    requests_per_s: float
    ttft_s: float
    tpot_s: float
    step_s: float
    running: float
    prefill_share: float


def serve(
    model: CostModel,
    *,
    concurrency: float,
    prompt: int,
    output: int,
    reuse: float = 0.0,
    most_running: float = math.inf,
    together: bool = False,
) -> Rates:
    """Return the rates of `concurrency` users who each send a request when the last has ended.

    `reuse` of each prompt is known already; `most_running` sequences fit at once. Steps either
    decode alone or read a chunk of one prompt beside; a request needs output / (yield x running)
    steps of the former kind and its chunks of the latter. Users `together` start at once with
    equal lengths, as in benchmarks of one round: they stay in step, and those for whom there is no
    room follow in further rounds.
    """
    lanes = model.deployment.dp * model.deployment.pp
    users = max(concurrency / lanes, 1.0)
    most = min(users, max(most_running / lanes, 1.0))
    known = int(prompt * reuse)
    fresh = max(prompt - known, 1)
    load = _Load(users, most, known, fresh, output, prompt + output / 2)
    seconds, ttft, tpot, share, running = (_rounds if together else _steady)(model, load)
    plain = model.decode(running, load.length)
    served = min(concurrency, lanes) / lanes
    return Rates(
        output_tokens_per_s=output / seconds * lanes * served,
        decode_tokens_per_s=most
        * model.yielded()
        / model.decode(most, load.length)
        * lanes
        * served,
        requests_per_s=lanes * served / seconds,
        ttft_s=ttft,
        tpot_s=tpot,
        step_s=plain,
        running=running * lanes * served,
        prefill_share=share,
    )


class _Load(NamedTuple):
    """What one lane (an attention rank, a pipeline's share) is asked to do."""

    users: float
    most: float
    known: int
    fresh: int
    output: int
    length: float


def _steady(model: CostModel, load: _Load) -> tuple[float, float, float, float, float]:
    """Return seconds a request, TTFT, TPOT, share of reading, and running, users out of step."""
    users, most = load.users, load.most
    chunks = math.ceil(load.fresh / model.deployment.max_batched_tokens)
    chunk = load.fresh / chunks
    alone, each = model.prefill(load.fresh, load.known), model.yielded()
    if users == 1:
        decoding = load.output / each * model.decode(1, load.length)
        seconds = alone + decoding
        return seconds, alone, decoding / load.output, alone / seconds, 1.0
    running = most
    seconds = ttft = share = 0.0
    for _ in range(80):
        plain = model.decode(running, load.length)
        busy = sum(
            model.mixed(running - 1, load.length, chunk, load.known + i * chunk)
            for i in range(chunks)
        )
        seconds = max(load.output / each / running - chunks, 0.0) * plain + busy
        share = busy / seconds
        ttft = busy * (1 + min(share / (2 * max(1 - share, 0.05)), most / 2))
        target = min(max(users - ttft / seconds, 1.0), most)
        if abs(target - running) < 1e-4 * running:
            break
        running += 0.5 * (target - running)
    if most == users:
        return seconds, ttft, (users * seconds - ttft) / load.output, share, running
    tpot = running * seconds / load.output
    return seconds, users * seconds - tpot * load.output, tpot, share, running  # some wait for room


def _rounds(model: CostModel, load: _Load) -> tuple[float, float, float, float, float]:
    """Return the same where all users start at once: rounds of reading, then decoding in step."""
    room, each = model.deployment.max_batched_tokens, model.yielded()
    left, total, reading, waited, decoding = load.users, 0.0, 0.0, 0.0, 0.0
    while left > 0:
        batch = min(left, load.most)
        packed = max(load.fresh, min(batch * load.fresh, room))
        burst = model.prefill(round(packed), load.known) * batch * load.fresh / packed
        alone = min(burst, model.prefill(load.fresh, load.known))
        waited += batch * (total + alone + (burst - alone) / 2)
        steps = load.output / each * model.decode(batch, load.length)
        decoding += batch * (steps + (burst - alone) / 2)
        reading += burst
        total += burst + steps
        left -= batch
    users = load.users
    tpot, seconds = decoding / users / load.output, total / users
    running = min(tpot * load.output / seconds, load.most)
    return seconds, waited / users, tpot, reading / total, running
