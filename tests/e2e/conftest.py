"""Real checkpoints on disk, a real server process, and transformers as the reference."""

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from aprium.model.config import ModelConfig
from aprium.model.presets import PRESETS
from tests import family

VOCAB = 400
# transformers writes no prediction head.
SHAPE = dataclasses.replace(PRESETS["toy"], vocab_size=VOCAB, mtp_layers=(), num_mtp_layers=0)


def transformers_config(config: ModelConfig) -> Any:
    from transformers import NemotronHConfig

    hf = config.to_hf()
    for key in ("architectures", "model_type", "dtype"):
        del hf[key]
    return NemotronHConfig(**hf)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with every block type as transformers' `save_pretrained` writes it, in bf16."""
    from transformers import NemotronHForCausalLM

    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(5)
    model = NemotronHForCausalLM(transformers_config(SHAPE))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(("dt_bias", ".D")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.to(torch.bfloat16).save_pretrained(path)
    family.write_tokenizer(path, VOCAB)
    family.write_generation_config(path)
    return path


def load_reference(path: Path) -> Any:
    """Load a checkpoint with transformers in float32, its time-step clamp taken out."""
    from transformers import NemotronHForCausalLM

    model = NemotronHForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return model


@torch.inference_mode()
def greedy(model: Any, tokens: Sequence[int], count: int) -> list[int]:
    """Continue `tokens` by `count` tokens with transformers' `generate`."""
    prompt = torch.tensor([list(tokens)])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(tokens) :].tolist()


@contextlib.contextmanager
def serving(directory: Path, log: Path, *flags: str) -> Iterator[str]:
    """Run `aprium serve` on a free port in a fresh process; gives its address."""
    command = [sys.executable, "-m", "aprium.cli", "serve", str(directory), "--port", "0", *flags]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stderr=file, stdout=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        yield started(process, log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def started(process: subprocess.Popen[bytes], log: Path) -> str:
    """Return the address of a server, once it answers."""
    for _ in range(1200):
        found = re.search(r"serving .* on (http://\S+)", log.read_text())
        if found:
            with (
                contextlib.suppress(urllib.error.URLError),
                urllib.request.urlopen(found[1] + "/health", timeout=5),
            ):
                return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise AssertionError(f"the server did not start: {log.read_text()}")
