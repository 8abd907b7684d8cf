"""What `aprium plan` does with its options: one plan, a search, a training plan, a simulation."""

import dataclasses
import json
from typing import Any

from aprium.base.config import from_dict
from aprium.base.errors import ConfigError
from aprium.plan.data import load_overrides
from aprium.plan.hardware import device, devices
from aprium.plan.plan import Load, Plan, make_plan

_SETTINGS = ("tp", "pp", "dp", "ep", "kv_dtype", "state_dtype", "drafts", "acceptance")
_SETTINGS += ("attention", "utilization", "offload_gb", "reserve_gb", "snapshots")
_SETTINGS += ("state_checkpoints",)


def run(model: str | None, options: dict[str, Any]) -> str:
    """Return what the command prints; raises ConfigError where options do not go together."""
    if options["list_gpus"]:
        return _list_gpus(options)
    if model is None:
        raise ConfigError("name the model to plan for, as in `aprium plan ultra --gpu h100-sxm`")
    if options["acceptance"] is not None and not options["drafts"]:
        raise ConfigError("--acceptance is of drafts: give --drafts too")
    load = Load(
        concurrency=options["concurrency"] or 16,
        prompt=options["prompt"],
        output=options["output"],
        context=options["context"],
        reuse=options["reuse"],
    )
    settings = {k: options[k] for k in _SETTINGS if options[k] is not None}
    if options["here"]:
        return _here(model, load, options)
    if options["searching"]:
        return _search(model, load, settings, options)
    if len(options["gpu"]) != 1:
        raise ConfigError("name one device with --gpu (--list-gpus names them), or use --search")
    (gpu,) = options["gpu"]
    if options["compare"]:
        return _compare(model, gpu, load, options)
    if options["train"]:
        return _train(model, gpu, load, options)
    found = make_plan(
        model,
        gpu=gpu,
        num=options["num"],
        precision=options["precision"],
        load=load,
        settings=settings,
        data=options["data"],
        price=options["price"],
        licence=options["licence"],
    )
    if options["trace"]:
        return _simulate(found, options)
    from aprium.plan import report

    if options["html"]:
        report.write_plan_page(found, options["html"])
    text = report.plan_json(found) if options["as_json"] else report.plan_text(found)
    return text if not options["html"] or options["as_json"] else f"{text}\n\n{options['html']}"


def _list_gpus(options: dict[str, Any]) -> str:
    found = devices(load_overrides(options["data"])).values()
    if options["as_json"]:
        return json.dumps({d.key: dataclasses.asdict(d) for d in found}, indent=2)
    lines = [f"{'':<16}{'GB':>7}{'TB/s':>8}{'BF16':>8}{'FP8':>8}{'FP4':>8} TFLOP/s"]
    for d in found:
        fp8 = d.fp8_tflops or d.int8_tops
        lines.append(
            f"{d.key:<16}{d.memory_gb:>7.1f}{d.bandwidth_tb_s:>8.3f}{d.bf16_tflops:>8,.0f}"
            f"{fp8:>8,.0f}{d.fp4_tflops:>8,.0f}  {d.name}"
        )
    return "\n".join(lines)


def _search(model: str, load: Load, settings: dict[str, Any], options: dict[str, Any]) -> str:
    from aprium.plan import report
    from aprium.plan.search import CONCURRENCY, COUNTS, pareto, search

    for name in ("tp", "pp", "dp", "ep"):
        if settings.pop(name, None) is not None:
            raise ConfigError(f"--{name} and --search do not go together: the search chooses it")
    found = search(
        model,
        load=load,
        gpus=[device(name, load_overrides(options["data"])).key for name in options["gpu"]],
        counts=[count for count in COUNTS if count <= options["max_num"]],
        precision=options["precision"],
        concurrency=None if options["concurrency"] else CONCURRENCY,
        settings=settings,
        max_tpot_s=options["max_tpot"],
        max_ttft_s=options["max_ttft"],
        data=options["data"],
    )
    if options["html"]:
        report.write_search_page(model, found, options["html"])
    if options["as_json"]:
        return json.dumps({"model": model, "pareto": report.search_rows(pareto(found))}, indent=2)
    return report.search_text(found)


def _compare(model: str, gpu: str, load: Load, options: dict[str, Any]) -> str:
    from aprium.plan import compare

    overrides = load_overrides(options["data"])
    where = device(gpu, overrides)
    drafts = options["drafts"] or 3
    rows = compare.compare(model, where, load, drafts=drafts, overrides=overrides)
    return json.dumps(rows, indent=2) if options["as_json"] else compare.as_text(rows)


def _train(model: str, gpu: str, load: Load, options: dict[str, Any]) -> str:
    from aprium.plan import report
    from aprium.plan.training import Training, training_plan

    training = from_dict(Training, {"method": options["train"]} | options["settings"])
    found = training_plan(
        model,
        where=device(gpu, load_overrides(options["data"])),
        num=options["num"],
        training=training,
        load=load,
    )
    return json.dumps(found, indent=2) if options["as_json"] else report.training_text(found)


def _simulate(found: Plan, options: dict[str, Any]) -> str:
    import time

    from aprium.plan import fleet

    overrides = load_overrides(options["data"])
    facts: dict[str, Any] = {"model": found.shape.name, "trace": options["trace"]}
    begun = time.perf_counter()
    if options["trace"].partition(":")[0] == "saturate":
        requests = _count(options["trace"])
        limit = options["max_ttft"] or float("inf")
        rate, summary = fleet.saturate_plan(found, overrides, requests=requests, limit_s=limit)
        facts["saturation_requests_per_s"] = rate
    else:
        summary = fleet.simulate_plan(found, options["trace"], overrides)
    facts |= dataclasses.asdict(summary)
    facts["simulated_in_s"] = time.perf_counter() - begun
    if options["as_json"]:
        return json.dumps(facts, indent=2)
    head = f"{found.shape.name} on {found.num} x {found.device.name}: {options['trace']}"
    if "saturation_requests_per_s" in facts:
        rate = facts["saturation_requests_per_s"]
        head += f"\n  keeps up with {rate:.3g} requests a second; at that rate:"
    return f"{head}\n{fleet.as_text(summary)}"


def _count(text: str) -> int:
    """Read the number of requests of `saturate` or `saturate:requests=500`."""
    _, colon, rest = text.partition(":")
    if not colon:
        return 1000
    key, _, value = rest.partition("=")
    if key != "requests" or not value.isdigit() or int(value) < 1:
        raise ConfigError(f"{text!r}: write saturate, or saturate:requests=500")
    return int(value)


def _here(model: str, load: Load, options: dict[str, Any]) -> str:
    if options["gpu"] or options["searching"] or options["train"] or options["trace"]:
        raise ConfigError("--here plans for this machine: leave --gpu, --search, --train out")
    from aprium.plan import here

    shape, where = here.shape_of(model), here.measure()
    batches = sorted({1, 4, 8, options["concurrency"] or 1})
    prompt, output = min(load.prompt, 512), min(load.output, 128)
    found = here.predict(shape, where, prompt=prompt, generate=output, batches=batches)
    if options["as_json"]:
        facts = {"model": shape.name, "weights_bytes": shape.num_bytes()}
        facts |= {"prompt": prompt, "generate": output, "device": dataclasses.asdict(where)}
        return json.dumps(facts | {"predicted": [p._asdict() for p in found]}, indent=2)
    return here.as_text(shape, where, found)
