"""Ask the planner: what holds Super for 32 users, what is cheapest, and when would it saturate.

python examples/plan.py
"""

from aprium.plan.fleet import saturate_plan
from aprium.plan.plan import Load, as_json, make_plan
from aprium.plan.search import dollars, pareto, search


def main() -> None:
    """Plan one deployment, search all, and simulate the first."""
    load = Load(concurrency=32, prompt=4096, output=512)
    plan = make_plan("super", gpu="b200", num=2, load=load)
    facts = as_json(plan)
    print(f"{facts['model']} on {plan.num} x {plan.device.name}: {facts['verdict']}")
    low, high = facts["ranges"]["output_tokens_per_s"]
    print(f"output: {facts['output_tokens_per_s']:,.0f} tok/s ({low:,.0f} to {high:,.0f})")

    best = pareto(search("super", load=load, gpus=["h100-sxm", "h200", "b200"]))
    for option in best[:3]:
        where = f"{option.num} x {option.device.key} {option.deployment.describe()}"
        print(f"among the cheapest: {where}, ${dollars(option):.2f} a million output tokens")

    rate, summary = saturate_plan(plan, {}, requests=200, limit_s=1.0)
    ttft = summary.ttft_s[1]
    print(f"keeps up with {rate:.2f} requests a second; 90 % of first tokens in {ttft:.2f} s")


if __name__ == "__main__":
    main()
