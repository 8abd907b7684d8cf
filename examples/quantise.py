"""Quantise pico to NVFP4 two ways and compare what each costs.

python examples/quantise.py [OUTPUT]
"""

import sys
from pathlib import Path

from aprium import LLM, SamplingParams
from aprium.quantize import recipes
from aprium.quantize.report import summary
from aprium.quantize.run import Options, run


def main(output: Path) -> None:
    """Round to nearest, then with GPTQ and swept scales, and ask the better one a question."""
    options = Options(num_samples=32, length=128)  # pico writes its own samples
    for name, changes in (
        ("nearest", {"rule": "max"}),
        ("gptq", {"rule": "sweep", "method": "gptq"}),
    ):
        recipe = recipes.read("nvfp4-all", changes)
        result = run("pico", output / name, recipe, options, say=print)
        print(f"{name}: {summary(result)}")
    with LLM(str(output / "gptq")) as llm:
        question = [{"role": "user", "content": "What is 27 + 58?"}]
        (completion,) = llm.generate([question], SamplingParams(temperature=0, max_tokens=64))
        print(completion.text)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "quantised"))
