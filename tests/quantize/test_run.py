"""The command as a whole, and where samples come from."""

import json

import pytest

from aprium.base.errors import DataError
from aprium.checkpoint.hub import PICO_DIR
from aprium.cli import main
from aprium.quantize import samples as samples_


def test_quantize_with_a_budget_and_a_file(tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text("The snake sees a stone. " * 60)
    target = tmp_path / "out"
    command = ["quantize", "pico", str(target), "--recipe", "nvfp4-all", "--budget", "5"]
    command += ["--calibration", str(file), "--length", "64", "--method", "gptq"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "8.mixer.qkv_proj" in out and "perplexity" in out
    report = json.loads((target / "report.json").read_text())
    assert report["bits"] <= 5 and report["quality"]["logit_kl"] > 0
    assert len(report["choices"]) == 29
    assert {m["format"] for m in report["matrices"]} >= {"w4a16_nvfp4", "fp8"}
    page = (target / "report.html").read_text()
    assert page.count("<svg") == 1 and "output error" in page


def test_quantize_with_the_models_own_samples_and_distillation(tmp_path, capsys):
    target = tmp_path / "out"
    command = ["quantize", "pico", str(target), "--samples", "8", "--length", "48", "--json"]
    command += ["--qad", "--qad-steps", "2", "--recipe", "ultra-nvfp4"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    report = json.loads((target / "report.json").read_text())
    assert result["quality"] == report["quality"]
    assert report["before_distillation"]["logit_kl"] > 0
    assert report["distillation"]["steps"] == 2


def test_lists_recipes(capsys):
    assert main(["quantize", "--list"]) == 0
    assert "ultra-nvfp4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pico", "OUT", "--recipe", "none"], "no recipe 'none'"),
        (["pico", "OUT", "--samples", "1"], "num_samples is 1"),
        (["pico", "OUT", "--rule", "best"], "rule is 'best'"),
        (["pico", "OUT", "--calibration", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_mistakes_end_with_one_line(arguments, said, tmp_path, capsys):
    words = [str(tmp_path / "out") if word == "OUT" else word for word in arguments]
    assert main(["quantize", *words]) == 1
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_model_writes_the_same_samples_again():
    one, two = (samples_.write_samples(PICO_DIR, count=3, length=40) for _ in range(2))
    assert one == two and [len(s) for s in one] == [40] * 3
    assert len({tuple(s) for s in one}) == 3
    with pytest.raises(DataError, match="too short"):
        samples_.write_samples(PICO_DIR, count=1, length=4)


def test_reads_text_documents_and_conversations(tmp_path):
    file = tmp_path / "rows.jsonl"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    rows = [{"text": "A snake."}, {"messages": talk}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = samples_.read_samples(file, PICO_DIR, count=10, length=30)
    assert len(found) == 2 and all(1 < len(s) <= 30 for s in found)
    file.write_text(json.dumps({"prompt": "x"}) + "\n")
    with pytest.raises(DataError, match="neither 'text' nor 'messages'"):
        samples_.read_samples(file, PICO_DIR, count=10, length=30)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(DataError, match="no text"):
        samples_.read_samples(empty, PICO_DIR, count=10, length=30)


def test_held_out_samples_are_not_calibrated_on():
    kept, held = samples_.split([[i] for i in range(10)])
    assert held == [[3], [7]] and len(kept) == 8
    assert samples_.split([[1], [2]]) == ([[1], [2]], [[1], [2]])
