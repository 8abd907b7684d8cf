"""Recipes give every shape the formats that the published files have."""

import pytest

from aprium.base.errors import ConfigError, QuantizeError
from aprium.checkpoint.names import matrices, matrix_role
from aprium.model.presets import PRESETS
from aprium.model.quant_presets import QUANT_PRESETS, quant_preset
from aprium.quantize import recipes

EXACT = [name for name in QUANT_PRESETS if name != "super-nvfp4"]


@pytest.mark.parametrize("name", EXACT)
def test_a_published_files_recipe_gives_its_formats(name):
    preset = quant_preset(name)
    recipe = recipes.read(name)
    assert recipes.formats_of(recipe, PRESETS[QUANT_PRESETS[name].base]) == preset.formats
    assert (recipe.kv_cache, recipe.kv_scales) == (preset.kv_cache, preset.kv_scales)


def test_supers_recipe_agrees_on_experts_and_differs_where_a_search_chose():
    mine = recipes.formats_of(recipes.read("super-nvfp4"), PRESETS["super"])
    theirs = quant_preset("super-nvfp4").formats
    experts = [name for name in theirs if ".experts." in name]
    assert len(experts) == 40960
    assert all(mine[name] == "nvfp4" for name in experts)
    assert {fmt for name, fmt in mine.items() if ".experts." not in name} == {"fp8"}


def test_there_is_a_recipe_for_every_published_file_and_all_can_be_read():
    assert set(QUANT_PRESETS) <= set(recipes.names())
    for name in recipes.names():
        recipe = recipes.read(name)
        assert recipe.description
        for preset in PRESETS.values():
            assert recipes.formats_of(recipe, preset)


def test_every_matrix_has_a_role():
    for config in PRESETS.values():
        roles = {matrix_role(name) for name in matrices(config)}
        assert roles <= {*recipes.Formats.__dataclass_fields__, "mtp"}


def test_effective_bits_counts_weights():
    config = PRESETS["pico"]
    assert recipes.effective_bits({}, config) == 16
    everything = recipes.formats_of(recipes.read("nvfp4-all"), config)
    assert recipes.effective_bits(everything, config) == 4.5


def test_mistakes_are_named(tmp_path):
    with pytest.raises(QuantizeError, match="no recipe 'nano': give a TOML file or one of fp8"):
        recipes.read("nano")
    file = tmp_path / "mine.toml"
    file.write_text('[formats]\nexperts = "nvfp4"\n')
    with pytest.raises(ConfigError, match=r"unknown key formats\.experts"):
        recipes.read(str(file))
    with pytest.raises(ConfigError, match="rule is 'best'"):
        recipes.read("nvfp4", {"rule": "best"})


def test_a_width_that_blocks_do_not_divide_is_refused_by_name():
    import dataclasses

    config = dataclasses.replace(PRESETS["toy"], expert_intermediate_size=24)
    with pytest.raises(QuantizeError, match=r"experts\.0\.down_proj: its 24 columns .* 'expert'"):
        recipes.formats_of(recipes.read("nvfp4-all"), config)
