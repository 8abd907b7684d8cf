"""Loading and saving: every layout comes back byte for byte, and every fault has its sentence."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from aprium.base.errors import CheckpointError
from aprium.checkpoint.load import load_checkpoint
from aprium.checkpoint.names import parameter_of
from aprium.checkpoint.save import save_checkpoint
from aprium.model.layout import Layout
from aprium.model.model import HybridModel
from aprium.model.presets import PRESETS
from tests import modelopt_layout

TOY = PRESETS["toy"]
SCHEMES = ["bf16", "fp8", "nvfp4", "mixed", "compressed-tensors", "compressed-fp8"]


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """One directory and its values per scheme, written once; tests copy before they break."""
    root = tmp_path_factory.mktemp("schemes")
    return {
        scheme: (root / scheme, modelopt_layout.write(root / scheme, TOY, scheme))
        for scheme in SCHEMES
    }


@pytest.fixture
def copy(written, tmp_path):
    """Copy a scheme's directory to be damaged."""

    def make(scheme: str) -> Path:
        return Path(shutil.copytree(written[scheme][0], tmp_path / scheme))

    return make


def raw(directory: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                value = opened.get_tensor(name)
                data = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                assert name not in found
                found[name] = (value.dtype, tuple(value.shape), data)
    return found


def edit(directory: Path, change) -> None:
    """Rewrite the single weight file after `change` was applied to its tensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_parameters_stand_for_the_stored_values(written, scheme):
    directory, values = written[scheme]
    checkpoint = load_checkpoint(directory)
    modules = dict(checkpoint.model.named_modules())
    for name, wanted in values.items():
        parameter, expert = parameter_of(name)
        owner, leaf = parameter.rsplit(".", 1)
        module = modules[owner]
        if leaf == "weight" and hasattr(module, "dense"):
            found = module.dense(torch.float32, expert)
        else:
            found = getattr(module, leaf).float()
        assert torch.equal(found, wanted), name
    assert checkpoint.generation_config == {"eos_token_id": [2, 11]}
    assert not checkpoint.model.training


@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_round_trip_is_byte_for_byte(written, scheme, max_shard_bytes, tmp_path):
    directory, _ = written[scheme]
    save_checkpoint(load_checkpoint(directory), tmp_path / "out", max_shard_bytes=max_shard_bytes)
    assert raw(tmp_path / "out") == raw(directory)
    for file in directory.iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (max_shard_bytes < 10**9)
    again = load_checkpoint(tmp_path / "out")
    assert {entry.name for entry in again.entries} == raw(directory).keys()
    assert not list(tmp_path.glob(".out*"))


def test_sharded_with_scalars_of_shape_one(tmp_path):
    modelopt_layout.write(tmp_path / "in", TOY, "nvfp4", num_shards=3, scalar_shape=(1,))
    save_checkpoint(load_checkpoint(tmp_path / "in"), tmp_path / "out")
    assert raw(tmp_path / "out") == raw(tmp_path / "in")


@pytest.mark.parametrize("prefix", ["model.", "language_model.backbone.", "stacked"])
def test_other_spellings_round_trip(copy, tmp_path, prefix):
    directory = copy("bf16")

    def respell(tensors):
        old = dict(tensors)
        tensors.clear()
        for name, value in old.items():
            new = name
            if prefix == "language_model.backbone.":
                new = "language_model." + name
            elif name.startswith("backbone."):
                new = "model." + name.removeprefix("backbone.")
            new = new.replace(".embeddings.", ".embedding.")
            parameter, expert = parameter_of(new)
            if prefix != "stacked" or expert is None:
                tensors[new] = value
            elif expert == 0:
                owner, leaf = parameter.removesuffix(".weight").rsplit(".", 1)
                owner = owner.replace("model.", "backbone.", 1)
                rows = [old[f"{owner}.{e}.{leaf}.weight"] for e in range(TOY.num_experts)]
                tensors[parameter.removesuffix(".weight")] = torch.stack(rows)

    plain = load_checkpoint(directory)
    edit(directory, respell)
    checkpoint = load_checkpoint(directory)
    for (name, a), b in zip(
        checkpoint.model.named_parameters(), plain.model.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    save_checkpoint(checkpoint, tmp_path / "out")
    assert raw(tmp_path / "out") == raw(directory)


def test_checkpoint_of_transformers_loads(tmp_path):
    from transformers import NemotronHConfig, NemotronHForCausalLM

    hf = TOY.to_hf() | {"num_nextn_predict_layers": 1}
    torch.manual_seed(0)
    theirs = NemotronHForCausalLM(NemotronHConfig(**hf)).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="100KB")
    checkpoint = load_checkpoint(tmp_path / "in")
    assert checkpoint.config.num_mtp_layers == 0  # configured, but transformers keeps none
    ours = dict(checkpoint.model.named_parameters())
    for name, value in theirs.state_dict().items():
        name = name.replace("model.", "backbone.", 1)
        assert torch.equal(ours.pop(parameter_of(name)[0]), value), name
    assert not ours
    save_checkpoint(checkpoint, tmp_path / "out")
    assert raw(tmp_path / "out") == raw(tmp_path / "in")


def test_stored_dtypes_are_kept(copy):
    directory = copy("bf16")

    def widen(tensors):
        for name in tensors:
            if name.endswith(("gate.weight", "A_log")):
                tensors[name] = tensors[name].float()
            if name.endswith("e_score_correction_bias"):
                tensors[name] = tensors[name].bfloat16()

    edit(directory, widen)
    model = load_checkpoint(directory, dtype=torch.bfloat16).model
    dtypes = {name: value.dtype for name, value in model.named_parameters()}
    for name, dtype in dtypes.items():
        wide = name.endswith(("gate.weight", "A_log"))
        assert dtype == (torch.float32 if wide else torch.bfloat16), name
    assert model.compute_dtype == torch.bfloat16


def test_bare_model_is_written_in_the_published_layout(tmp_path):
    model = HybridModel(TOY, dtype=torch.float32)
    model.init_weights(torch.Generator().manual_seed(3))
    save_checkpoint(model, tmp_path / "out", dtype=torch.bfloat16)
    again = load_checkpoint(tmp_path / "out")
    assert again.config == TOY
    for (name, a), b in zip(model.named_parameters(), again.model.parameters(), strict=True):
        bias = name.endswith("e_score_correction_bias")
        assert b.dtype == (torch.float32 if bias else torch.bfloat16)
        assert torch.equal(a.to(b.dtype), b), name


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_bare_quantised_model_says_how_it_is_stored(written, scheme, tmp_path):
    checkpoint = load_checkpoint(written[scheme][0])
    save_checkpoint(checkpoint.model, tmp_path / "out")
    again = load_checkpoint(tmp_path / "out")
    assert again.quant == checkpoint.quant
    old, new = raw(written[scheme][0]), raw(tmp_path / "out")
    assert {n: (v[0], v[2]) for n, v in old.items()} == {n: (v[0], v[2]) for n, v in new.items()}


def test_saving_over_its_own_directory(copy):
    directory = copy("nvfp4")
    before = raw(directory)
    (directory / "notes.md").write_text("mine")
    save_checkpoint(load_checkpoint(directory), directory, max_shard_bytes=50_000)
    assert raw(directory) == before
    assert (directory / "notes.md").read_text() == "mine"
    assert not (directory / "model.safetensors").exists()


def test_dummy_weights_run():
    a, b = (load_checkpoint("toy", load_format="dummy").model for _ in range(2))
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)
    assert a(torch.arange(8), Layout.packed([8])).isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_dummy_weights_of_a_quantised_directory_run(written, scheme, tmp_path):
    for file in written[scheme][0].glob("*.json"):
        shutil.copy(file, tmp_path)
    checkpoint = load_checkpoint(tmp_path, load_format="dummy")
    with torch.no_grad():
        hidden = checkpoint.model(torch.arange(8), Layout.packed([8]))
        assert hidden.isfinite().all()
        assert 1e-3 < float(checkpoint.model.logits(hidden).std()) < 1e3


SHARED = "backbone.layers.2.mixer.shared_experts.up_proj"


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


def poke(name, index, code):
    def change(tensors):
        tensors[name].view(torch.uint8)[index] = code

    return change


FAULTS = {
    "missing tensor": ("bf16", drop("backbone.norm_f.weight"), ["1 missing", "norm_f.weight"]),
    "unexpected tensor": (
        "bf16",
        put("backbone.layers.9.norm.weight", torch.ones(48)),
        ["1 unexpected", "layers.9.norm"],
    ),
    "missing expert": (
        "bf16",
        drop("backbone.layers.2.mixer.experts.5.up_proj.weight"),
        ["missing", "experts.5.up_proj.weight"],
    ),
    "wrong shape": (
        "bf16",
        put("backbone.norm_f.weight", torch.ones(47)),
        ["model.safetensors", "'backbone.norm_f.weight'", "[47]", "[48]"],
    ),
    "wrong dtype": (
        "bf16",
        put("backbone.norm_f.weight", torch.ones(48, dtype=torch.int64)),
        ["model.safetensors", "'backbone.norm_f.weight'", "I64", "BF16"],
    ),
    "experts of two dtypes": (
        "bf16",
        put("backbone.layers.2.mixer.experts.1.up_proj.weight", torch.ones(48, 32)),
        ["experts.0.up_proj.weight' is BF16", "float32"],
    ),
    "NaN block scale": (
        "nvfp4",
        poke(f"{SHARED}.weight_scale", (3, 1), 0x7F),
        ["model.safetensors", f"{SHARED}.weight_scale", "NaN"],
    ),
    "all-ones block scale": (
        "nvfp4",
        poke(f"{SHARED}.weight_scale", (0, 0), 0xFF),
        [f"{SHARED}.weight_scale", "NaN"],
    ),
    "negative block scale": (
        "nvfp4",
        poke(f"{SHARED}.weight_scale", (2, 2), 0x81),
        ["model.safetensors", f"{SHARED}.weight_scale", "negative"],
    ),
    "NaN global scale": (
        "nvfp4",
        put(f"{SHARED}.weight_scale_2", torch.tensor(float("nan"))),
        [f"{SHARED}.weight_scale_2", "nan"],
    ),
    "negative FP8 scale": (
        "fp8",
        put(f"{SHARED}.weight_scale", torch.tensor(-1.0)),
        [f"{SHARED}.weight_scale", "-1.0"],
    ),
    "infinite input scale": (
        "fp8",
        put(f"{SHARED}.input_scale", torch.tensor(float("inf"))),
        [f"{SHARED}.input_scale", "inf"],
    ),
    "zero divisor": (
        "compressed-tensors",
        put(f"{SHARED}.weight_global_scale", torch.tensor([0.0])),
        [f"{SHARED}.weight_global_scale", "0.0"],
    ),
    "one input scale missing": (
        "nvfp4",
        drop(f"{SHARED}.input_scale"),
        ["1 missing", f"{SHARED}.input_scale"],
    ),
    "scale missing": ("fp8", drop(f"{SHARED}.weight_scale"), [f"{SHARED}.weight_scale"]),
    "one KV scale missing": (
        "mixed",
        drop("backbone.layers.3.mixer.k_proj.k_scale"),
        ["missing", "k_proj.k_scale"],
    ),
    "unquantised against the configuration": (
        "nvfp4",
        put(f"{SHARED}.weight", torch.ones(64, 48)),
        [f"{SHARED} is stored as an unquantised", "hf_quant_config.json", "nvfp4"],
    ),
    "quantised against the configuration": (
        "fp8",
        put("lm_head.weight", torch.ones(272, 48).to(torch.float8_e4m3fn)),
        ["lm_head is stored as fp8", "declares it unquantised"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_tensors_are_named(copy, fault):
    scheme, change, words = FAULTS[fault]
    directory = copy(scheme)
    edit(directory, change)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(directory)
    for word in words:
        assert word in str(raised.value)
    assert len(str(raised.value)) < 2000


def test_truncated_file_is_named(copy):
    file = copy("bf16") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated: tensor '"):
        load_checkpoint(file.parent)


def test_missing_shard_is_named(tmp_path):
    modelopt_layout.write(tmp_path, TOY, "bf16", num_shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors is missing.*example '"):
        load_checkpoint(tmp_path)


def test_a_long_list_of_names_is_cut(copy):
    directory = copy("bf16")
    edit(directory, lambda tensors: [tensors.pop(n) for n in list(tensors) if ".experts." in n])
    with pytest.raises(CheckpointError, match="and 40 more") as raised:
        load_checkpoint(directory)
    assert len(str(raised.value)) < 1200


def test_other_model_types_are_refused(copy):
    directory = copy("bf16")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"config\.json: .*llama"):
        load_checkpoint(directory)


def test_unquantised_prediction_head_need_not_be_listed(copy):
    directory = copy("nvfp4")
    file = directory / "hf_quant_config.json"
    data = json.loads(file.read_text())
    data["quantization"]["exclude_modules"].remove("mtp*")
    file.write_text(json.dumps(data))
    quant = load_checkpoint(directory).quant
    assert not any(name.startswith("mtp.") for name in quant.formats)


PEAK = """
import re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from aprium.checkpoint.load import load_checkpoint

def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

load_checkpoint(sys.argv[2])
before = kilobytes("VmRSS")
load_checkpoint(sys.argv[1])
print((kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.parametrize("num_shards", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_loading_never_holds_a_second_copy(written, tmp_path, num_shards):
    config = replace(
        TOY,
        hidden_size=512,
        num_experts=32,
        expert_intermediate_size=1024,
        latent_size=512,
        layers=("mamba", "moe", "moe", "attention"),
    )
    modelopt_layout.write(tmp_path, config, "bf16", num_shards=num_shards)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size > 150e6
    arguments = [sys.executable, "-c", PEAK, str(tmp_path), str(written["bf16"][0])]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    # The peak is the model, in huge pages, and what the reading threads need.
    assert 0.9 * size < int(done.stdout) < size + 24e6


@pytest.mark.parametrize("scheme", SCHEMES)
def test_mapped_weights_give_the_same_bits(written, tmp_path, scheme):
    directory, _ = written[scheme]
    read, mapped = (load_checkpoint(directory, load=load) for load in ("memory", "mmap"))
    assert (read.load, mapped.load) == ("memory", "mmap")
    tokens, layout = torch.arange(20), Layout.packed([20])
    with torch.inference_mode():
        assert torch.equal(read.model(tokens, layout), mapped.model(tokens, layout))
    with pytest.raises(CheckpointError, match="mapped, not in memory"):
        save_checkpoint(mapped, tmp_path / "copy")
    with pytest.raises(CheckpointError, match="unknown load mode 'disk'"):
        load_checkpoint(directory, load="disk")  # type: ignore[arg-type]


def test_a_stored_projection_wins_over_the_tie_flag(tmp_path: Path) -> None:
    model = HybridModel(TOY, dtype=torch.float32)
    model.init_weights(torch.Generator().manual_seed(0))
    save_checkpoint(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    loaded = load_checkpoint(tmp_path)
    assert torch.equal(loaded.model.lm_head.weight, model.lm_head.weight)


def test_toy_is_random_and_always_the_same() -> None:
    one, other = load_checkpoint("toy").model, load_checkpoint("toy", load_format="dummy").model
    for (name, first), (_, second) in zip(
        one.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(first, second), name
