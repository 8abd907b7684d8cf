"""How full packs get: best fit by the number of open packs, on a mixture of conversations.

python benchmarks/packing.py [--budget 4096] [--packs 200] [--data FILE --tokenizer DIR]

Lengths are those of a long-tailed mixture: short and long conversations and documents cut to the
budget, log-normal; with --data those of the conversations in a file, as fine-tuning reads them.
Every number of open packs sees the same samples. Prints one JSON line a case: the share of the
budget that tokens fill, samples a pack, and samples placed a second; beside them next-fit, which
closes a pack as soon as a sample does not fit (one open pack).
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

from aprium.base.records import Sample
from aprium.data.pack import Packer
from aprium.data.sources import DataConfig, Mixture, SourceConfig, Text
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer

# Share of samples, mean and deviation of the logarithm of the length in tokens.
KINDS = ((0.45, 5.0, 0.7), (0.35, 6.3, 0.8), (0.20, 7.6, 0.6))


def synthetic(budget: int) -> Iterator[Sample]:
    """Yield samples of lengths drawn by kind; tokens are numbers, so that no two are the same."""
    rng = random.Random(0)
    number = 0
    while True:
        (_, mean, deviation) = rng.choices(KINDS, [kind[0] for kind in KINDS])[0]
        length = min(budget, max(8, int(rng.lognormvariate(mean, deviation))))
        number += 1
        yield Sample(tokens=(number,) * length, ce_weight=(0.0,) + (1.0,) * (length - 1))


def conversations(file: Path, tokenizer: str, budget: int) -> Iterator[Sample]:
    """Yield the samples of the conversations in `file`, shuffled again and again."""
    text = Text(Tokenizer.load(tokenizer), ChatTemplate.load(tokenizer))
    source = SourceConfig(kind="chat", name="chat", path=file, too_long="skip")
    mixture = Mixture(DataConfig(sources=(source,), max_length=budget), text)
    while True:
        yield mixture.draw()[1]


def main() -> None:
    """Pack the same samples with more and more open packs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=int, default=4096)
    parser.add_argument("--packs", type=int, default=200)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokenizer", default="aprium/pico_checkpoint")
    options = parser.parse_args()
    for num_open in (1, 2, 4, 8, 16, 32, 64):
        source = (
            conversations(options.data, options.tokenizer, options.budget)
            if options.data
            else synthetic(options.budget)
        )
        packer, filled, samples, seconds = Packer(options.budget, num_open), 0, 0, 0.0
        packs = placed = 0
        while packs < options.packs:
            sample = next(source)
            begun = time.perf_counter()
            pack = packer.add(sample)
            seconds += time.perf_counter() - begun
            placed += 1
            if pack is not None:
                packs += 1
                samples += len(pack)
                filled += sum(len(s.tokens) for s in pack)
        line = {
            "case": f"{num_open} open",
            "budget": options.budget,
            "efficiency": round(filled / (options.budget * packs), 4),
            "samples_per_pack": round(samples / packs, 1),
            "placed_per_s": round(placed / seconds),
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
