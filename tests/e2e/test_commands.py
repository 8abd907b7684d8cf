"""`aprium chat` and `aprium generate` on a real checkpoint, without a terminal."""

import io
import json
from pathlib import Path

import pytest

from aprium import cli
from aprium.text.tokenizer import Tokenizer
from tests.e2e.conftest import greedy, load_reference

SHORT = ["--max-tokens", "8", "--temperature", "0"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_generate(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, model = "the quick brown", str(checkpoint)
    options = ["--prompt", prompt, "--max_tokens", "8", "--temperature", "0", "--ignore-eos"]
    tokenizer = Tokenizer.load(checkpoint)
    ids = greedy(load_reference(checkpoint), tokenizer.encode(prompt), 8)
    assert run(capsys, "generate", model, *options) == tokenizer.decode(ids) + "\n"
    found = json.loads(run(capsys, "generate", model, *options, "--json", "--logprobs", "2"))
    assert found["prompt"] == prompt
    (completion,) = found["completions"]
    assert completion["tokens"] == ids
    assert completion["text"] == tokenizer.decode(ids)
    assert completion["finish"] == "length"
    assert len(completion["logprobs"]) == 8


def test_generate_several(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["--prompt", "a", "--prompt", "b"]
    options = ["--n", "2", "--seed", "3", "--max-tokens", "4", "--json"]
    found = json.loads(run(capsys, "generate", str(checkpoint), *prompts, *options))
    assert [r["prompt"] for r in found["results"]] == ["a", "b"]
    assert [[c["index"] for c in r["completions"]] for r in found["results"]] == [[0, 1]] * 2


def test_chat_once(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "chat", str(checkpoint), "what is 4?", *SHORT)
    assert "tokens/s" in out.splitlines()[-1]
    again = run(capsys, "chat", str(checkpoint), "what is 4?", *SHORT)
    assert out.splitlines()[:-1] == again.splitlines()[:-1]
    other = run(capsys, "chat", str(checkpoint), "what is 4?", "--no-thinking", *SHORT)
    assert other.splitlines()[:-1] != out.splitlines()[:-1]


def test_chat_reads_questions_without_a_terminal(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "what is 4?\n\n/thinking\n/reset\n/unknown\nnumber\n/quit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    out = run(capsys, "chat", str(checkpoint), "--system", "be brief", *SHORT)
    assert out.count("tokens/s") == 2
    assert "thinking off" in out
    assert "a new conversation" in out


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["generate", "/no/such", "--prompt", "x"], 1, "no checkpoint '/no/such'"),
        (["generate", "/no/such"], 2, "--prompt"),
        (["chat", "a", "b", "c"], 2, "at most a model and a prompt"),
        (["chat", "/no/such", "x"], 1, "no checkpoint"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_errors(
    arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == status
    assert words in capsys.readouterr().err


def test_bad_sampling_is_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(checkpoint), "--prompt", "x", "--temperature", "-1"]
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err.startswith("aprium: error: temperature is -1")


def test_bench(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt", "20", "--generate", "5", "--batch", "1,3"]
    found = json.loads(run(capsys, "bench", str(checkpoint), *options, "--json"))
    assert [r["batch"] for r in found["results"]] == [1, 3]
    for result in found["results"]:
        assert result["prefill_tokens_per_s"] > 0 and result["decode_tokens_per_s"] > 0
    for row in found["prediction"]:
        assert row["error"] == row["predicted"] / row["measured"] - 1
    lines = run(capsys, "bench", str(checkpoint), *options).splitlines()
    assert "decode tok/s" in lines[0] and "predicted" in lines[4]
    assert len(lines) == 3 + 2 + 2 * 2  # two rates of two batches beside their predictions
    assert cli.main(["bench", str(checkpoint), "--batch", "1,none"]) == 2
    assert "--batch 1,none" in capsys.readouterr().err
    assert cli.main(["bench", str(checkpoint), "--generate", "1"]) == 1
    assert "generate is 1: it must be at least 2" in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(run(capsys, "doctor", "--json"))
    assert facts["isa"] in (*facts["supported"], "none")
    assert all(error < 1e-4 for error in facts["agreement"].values())
    if facts["supported"]:
        models = facts["models"]
        assert models["pico"]["fits"] and not models["ultra"]["fits"]
        ultra, nano = (models[n]["decode_tokens_per_s_at_most"] for n in ("ultra", "nano-nvfp4"))
        assert nano > 10 * ultra
    text = run(capsys, "doctor")
    assert "kernels" in text and "memory" in text
