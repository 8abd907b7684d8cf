"""Logits and greedy tokens against transformers' own implementation, in float32."""

import random

import pytest
import torch

from aprium.model.config import PATTERN_KINDS, ModelConfig
from aprium.model.layout import Layout
from aprium.model.model import HybridModel
from aprium.model.state import HybridState

transformers = pytest.importorskip("transformers")


def random_config(seed: int) -> ModelConfig:
    """Draw a small shape; over the seeds every block type, latent and group count comes up."""
    rng = random.Random(seed)
    # transformers cannot generate without an attention layer.
    forced = "M*E-"[seed % 4]
    pattern = [forced, "M", "*", *rng.choices("ME*-", k=rng.randint(1, 5))]
    rng.shuffle(pattern)
    groups, kv = rng.choice((1, 2, 3)), rng.choice((1, 2, 3))
    router_groups = rng.choice((1, 2, 4))
    experts = router_groups * rng.randint(2, 4)
    active_groups = rng.randint(1, router_groups)
    eligible = experts // router_groups * active_groups
    return ModelConfig(
        vocab_size=rng.randint(60, 150),
        hidden_size=rng.choice((24, 33, 40, 64)),
        layers=tuple(PATTERN_KINDS[letter] for letter in pattern),
        num_heads=kv * rng.randint(1, 3),
        num_kv_heads=kv,
        head_dim=rng.choice((8, 12, 16)),
        mamba_num_heads=groups * rng.randint(1, 4),
        mamba_head_dim=rng.choice((4, 7, 16)),
        ssm_state_size=rng.choice((5, 8, 16)),
        num_groups=groups,
        conv_kernel=rng.choice((2, 4)),
        chunk_size=rng.choice((4, 8, 32)),
        intermediate_size=rng.choice((31, 64)),
        num_experts=experts,
        num_active_experts=rng.randint(1, eligible),
        expert_intermediate_size=rng.choice((17, 32)),
        shared_expert_intermediate_size=rng.choice((23, 48)),
        latent_size=rng.choice((None, 16, 21)),
        routed_scaling_factor=rng.choice((1.0, 2.5)),
        norm_topk_prob=rng.random() < 0.8,
        num_router_groups=router_groups,
        num_active_router_groups=active_groups,
        conv_bias=rng.random() < 0.8,
        mlp_bias=rng.random() < 0.3,
        mamba_proj_bias=rng.random() < 0.3,
        initializer_range=0.1,
        max_position_embeddings=512,
    )


def to_transformers(model: HybridModel) -> "transformers.PreTrainedModel":
    """Build transformers' model with the same weights, its time-step clamp taken out."""
    hf = model.config.to_hf()
    for key in ("architectures", "model_type", "dtype"):
        del hf[key]
    reference = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**hf)).float().eval()
    # Its grouped matrix product refuses odd widths; the plain loop takes any.
    reference.set_experts_implementation("eager")
    for module in reference.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    weights = {}
    for name, parameter in model.named_parameters():
        name = name.replace("backbone.", "model.")
        if ".mixer.experts." in name:
            name = name.removesuffix(".weight")
        weights[name] = parameter.detach()
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not missing, missing
    return reference


def random_model(config: ModelConfig, seed: int) -> HybridModel:
    """Initialise a model so that no parameter is at a value that hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    model = HybridModel(config, dtype=torch.float32)
    model.init_weights(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if "norm" in name or leaf in ("D", "dt_bias", "bias", "e_score_correction_bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.mark.parametrize("seed", range(28))
@torch.inference_mode()
def test_logits_and_greedy_tokens(seed: int) -> None:
    config = random_config(seed)
    model = random_model(config, seed)
    reference = to_transformers(model)
    generator = torch.Generator().manual_seed(seed)
    # No token 0: generate() takes the pad token's id for padding and masks it.
    tokens = torch.randint(1, config.vocab_size, (29,), generator=generator)
    expected = reference(tokens[None]).logits[0]
    bound = 1e-4 * expected.abs().max()
    stateless = model.logits(model(tokens, Layout.packed([29])))
    assert (stateless - expected).abs().max() < bound

    state = HybridState.allocate(config, num_slots=1, num_pages=4, page_size=16)
    done, produced = 0, []
    step = tokens
    for _ in range(9):
        layout = Layout.build(
            lengths=[len(step)], context=[done], slots=[0], pages=[[3, 1, 0, 2]], page_size=16
        )
        logits = model.logits(model(step, layout, state))
        if done == 0:
            assert (logits - expected).abs().max() < bound
        done += len(step)
        step = logits[-1:].argmax(-1)
        produced.append(int(step))
    generated = reference.generate(
        tokens[None], max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert produced == generated[0, 29:].tolist()
