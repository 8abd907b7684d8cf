"""The named shapes: the four published models, the bundled `pico`, and `toy` for tests.

Values are those of the published `config.json` files. `pico` ships weights with the package;
`toy` has one of each block type plus a prediction head and is always randomly initialised.
"""

from aprium.base.errors import ConfigError
from aprium.model.config import PATTERN_KINDS, ModelConfig


def _layers(pattern: str) -> tuple[str, ...]:
    return tuple(PATTERN_KINDS[letter] for letter in pattern)


_MTP = _layers("*E")
_NANO = ModelConfig(
    vocab_size=131072,
    hidden_size=2688,
    layers=_layers("MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"),
    routed_scaling_factor=2.5,
)

PRESETS: dict[str, ModelConfig] = {
    "nano": _NANO,
    "lightning": ModelConfig(
        vocab_size=131072,
        hidden_size=2688,
        layers=_NANO.layers,
        mtp_layers=_MTP,
        num_mtp_layers=1,
        routed_scaling_factor=2.5,
        max_position_embeddings=1048576,
    ),
    "super": ModelConfig(
        vocab_size=131072,
        hidden_size=4096,
        layers=_layers(
            "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*"
            "EMEMEMEM*EMEMEMEME"
        ),
        mtp_layers=_MTP,
        num_mtp_layers=1,
        mamba_num_heads=128,
        intermediate_size=2688,
        num_experts=512,
        num_active_experts=22,
        expert_intermediate_size=2688,
        shared_expert_intermediate_size=5376,
        latent_size=1024,
        routed_scaling_factor=5.0,
    ),
    "ultra": ModelConfig(
        vocab_size=131072,
        hidden_size=8192,
        layers=_layers(
            "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*"
            "EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
        ),
        mtp_layers=_MTP,
        num_mtp_layers=1,
        num_heads=64,
        mamba_num_heads=256,
        intermediate_size=5120,
        num_experts=512,
        num_active_experts=22,
        expert_intermediate_size=5120,
        shared_expert_intermediate_size=10240,
        latent_size=2048,
        routed_scaling_factor=5.0,
    ),
    "pico": ModelConfig(
        vocab_size=512,
        hidden_size=192,
        layers=_layers("M-MEM*EM*E"),
        mtp_layers=_MTP,
        num_mtp_layers=1,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        mamba_num_heads=12,
        mamba_head_dim=32,
        ssm_state_size=32,
        num_groups=2,
        chunk_size=32,
        intermediate_size=512,
        num_experts=16,
        num_active_experts=2,
        expert_intermediate_size=192,
        shared_expert_intermediate_size=192,
        latent_size=96,
        routed_scaling_factor=2.5,
        max_position_embeddings=8192,
        eos_token_id=11,
    ),
    "toy": ModelConfig(
        vocab_size=272,
        hidden_size=48,
        layers=_layers("M-E*ME"),
        mtp_layers=_MTP,
        num_mtp_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=16,
        num_groups=2,
        chunk_size=16,
        intermediate_size=80,
        num_experts=8,
        num_active_experts=3,
        expert_intermediate_size=48,
        shared_expert_intermediate_size=64,
        latent_size=32,
        routed_scaling_factor=2.5,
        max_position_embeddings=4096,
        initializer_range=0.2,
    ),
}


def preset(name: str) -> ModelConfig:
    """Return the shape called `name`; raise ConfigError listing the known names otherwise."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}: the known ones are {', '.join(PRESETS)}")
    return PRESETS[name]
