"""What a recipe says: which matrices get which format, and how their block scales are chosen.

Recipes are TOML files, one for each published checkpoint and a few for any model; a format belongs
to a role, so that a recipe fits every shape of the family. Formats of single matrices, as a search
finds them, replace those of roles. No torch. Source: docs/architecture.md (quantised checkpoints).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from aprium.base.config import load_toml
from aprium.base.errors import QuantizeError
from aprium.checkpoint.names import matrices, matrix_role
from aprium.model.config import ModelConfig, QuantConfig

DIRECTORY = Path(__file__).parent / "recipes"
Format = Literal["nvfp4", "w4a16_nvfp4", "fp8"]
BITS = {"nvfp4": 4.5, "w4a16_nvfp4": 4.5, "fp8": 8.0, None: 16.0}
METHODS = ("rtn", "gptq")


@dataclass(frozen=True, kw_only=True)
class Formats:
    """The format of each role; None leaves it as it is."""

    expert: Format | None = None
    shared_expert: Format | None = None
    mamba_in: Format | None = None
    mamba_out: Format | None = None
    attention_qkv: Format | None = None
    attention_out: Format | None = None
    latent: Format | None = None
    mlp: Format | None = None
    head: Format | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe.

    `rule` chooses NVFP4 block scales (see `ops.nvfp4.encode`). `method` "rtn" rounds to nearest,
    "gptq" compensates errors over calibration inputs. `weighted` weighs squared errors of searches
    by the inputs' mean squares. `kv_scales` calibrates FP8 cache scales. The prediction head,
    embeddings, router, norms and convolution are never quantised.
    """

    description: str = ""
    formats: Formats = field(default_factory=Formats)
    rule: Literal["max", "four_over_six", "sweep"] = "max"
    method: Literal["rtn", "gptq"] = "rtn"
    weighted: bool = False
    kv_cache: Literal["fp8"] | None = None
    kv_scales: bool = False
    keep_mamba_before_attention: bool = False

    def needs_inputs(self, formats: Iterable[str | None]) -> bool:
        """Tell whether calibration inputs decide anything that is written in these `formats`."""
        static = bool({"fp8", "nvfp4"} & set(formats))
        searched = self.weighted and self.rule != "max"
        return static or searched or self.method == "gptq" or self.kv_scales


def names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(file.stem for file in DIRECTORY.glob("*.toml"))


def read(name: str, overrides: Mapping[str, object] | None = None) -> Recipe:
    """Read the recipe called `name`, or the TOML file of that path; `overrides` replace its keys.

    Raises QuantizeError listing the names there are, ConfigError for a file with a mistake.
    """
    file = DIRECTORY / f"{name}.toml"
    if not file.exists():
        file = Path(name)
        if not file.is_file():
            known = ", ".join(names())
            raise QuantizeError(f"no recipe {name!r}: give a TOML file or one of {known}")
    return load_toml(Recipe, file, overrides)


def formats_of(recipe: Recipe, config: ModelConfig) -> dict[str, str]:
    """Return the format of every matrix that `recipe` quantises, by published module name.

    Raises QuantizeError for an NVFP4 matrix whose columns are not a multiple of 16.
    """
    found: dict[str, str] = {}
    for module, matrix in matrices(config).items():
        role = matrix_role(module)
        fmt = None if role == "mtp" else getattr(recipe.formats, role)
        if fmt is None or (recipe.keep_mamba_before_attention and _feeds_attention(module, config)):
            continue
        if fmt != "fp8" and matrix.columns % 16:
            raise QuantizeError(
                f"{module}: its {matrix.columns} columns are not a multiple of 16, the block of "
                f"NVFP4: give the role {role!r} another format"
            )
        found[module] = fmt
    return found


def _feeds_attention(module: str, config: ModelConfig) -> bool:
    """Tell whether `module` is of a Mamba layer right before an attention layer."""
    if not module.endswith((".in_proj", ".out_proj")):
        return False
    index = int(module.split(".")[2])
    return config.layers[index + 1 : index + 2] == ("attention",)


def quant_of(recipe: Recipe, formats: Mapping[str, str], layout: str = "modelopt") -> QuantConfig:
    """Return how a checkpoint with these `formats` by module is declared."""
    return QuantConfig(
        formats=dict(formats),
        kv_cache=recipe.kv_cache,
        kv_scales=recipe.kv_scales,
        layout=layout,
    )


def effective_bits(formats: Mapping[str, str], config: ModelConfig) -> float:
    """Return the mean bits a weight over the matrices of the backbone's layers, scales included."""
    bits = count = 0.0
    for module, matrix in matrices(config).items():
        if matrix_role(module) in ("mtp", "head"):
            continue
        size = matrix.rows * matrix.columns
        bits += BITS[formats.get(module)] * size
        count += size
    return bits / count
