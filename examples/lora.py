"""Teach pico an answer with LoRA, merge the adapter, and ask before and after.

python examples/lora.py [OUTPUT]
"""

import sys
import tempfile
from pathlib import Path

import torch

from aprium import LLM
from aprium.base.records import Message, SamplingParams
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import load_checkpoint
from aprium.data.conversation import Style, conversation
from aprium.quantize.merge import merge
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer
from aprium.train import lora
from aprium.train.batch import collate
from aprium.train.lora import LoraConfig
from aprium.train.losses import LossConfig, compute_losses

QUESTION, ANSWER = "What grows on a plum tree?", "Blue plums, late in summer."
QUIET = SamplingParams(max_tokens=24, temperature=0.0)


def ask(model: str) -> str:
    """Return what the model in `model` answers."""
    with LLM(model) as llm:
        question = [{"role": "user", "content": QUESTION}]
        (completion,) = llm.generate(
            [question], QUIET, chat_template_kwargs={"enable_thinking": False}
        )
        return completion.text.strip()


def main(output: Path) -> None:
    """Train factors beside the projections of pico for 40 steps, and write both checkpoints."""
    tokenizer, template = Tokenizer.load(PICO_DIR), ChatTemplate.load(PICO_DIR)
    messages = [
        Message(role="user", content=QUESTION),
        Message(role="assistant", content=ANSWER),
    ]
    style = Style(thinking=False)
    batch = collate(conversation(messages, tokenizer, template, "plums", style=style))
    model = load_checkpoint(PICO_DIR, load="memory").model
    adapter = lora.attach(model, LoraConfig(r=8, alpha=16.0))
    count = sum(p.numel() for p in adapter.parameters().values())
    print(f"{count:,} of {sum(p.numel() for p in model.parameters()):,} parameters are trained")
    optimiser = torch.optim.AdamW(adapter.parameters().values(), lr=5e-3)
    loss_config = LossConfig(mtp_weight=0.0, balance_weight=0.0)
    for step in range(40):
        loss = compute_losses(model, batch, loss_config).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    lora.save(adapter, output / "adapter", base="pico")  # PEFT reads it too
    merge(PICO_DIR, output / "adapter", output / "merged")
    print("before:", ask("pico"))
    print("after:", ask(str(output / "merged")))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as place:
            main(Path(place))
