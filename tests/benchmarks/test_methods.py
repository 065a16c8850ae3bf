"""Every method that a comparison knows can be built, and differs from the others."""

from __future__ import annotations

import json

import pytest

from benchmarks._methods import ABLATIONS, BASELINES, METHODS, settings_of
from broker_server.strategies import strategy_named
from broker_server.strategies.prefix import prefix_rule

WITH_PARTS = tuple(f"{name}+parts" for name in (*BASELINES, "legend-paper"))


@pytest.mark.parametrize("method", [*METHODS, *WITH_PARTS, *ABLATIONS])
def test_a_method_s_options_are_those_of_its_strategy(method: str) -> None:
    settings = settings_of(method, layer_count=6)
    name = settings["strategy"]
    _, options = prefix_rule(name, settings.get("strategy_options", {}))
    strategy_named(name, options)


def test_no_two_variants_of_an_ablation_are_the_same_run() -> None:
    drawn = [json.dumps(settings_of(name, layer_count=6), sort_keys=True) for name in ABLATIONS]
    assert len(set(drawn)) == len(ABLATIONS)


def test_every_variant_without_depth_trains_all_layers_of_the_model_at_hand() -> None:
    for layers in (3, 6):
        assert settings_of("no-depth", layers)["strategy_options"]["depth_min"] == layers


@pytest.mark.parametrize("method", ["fedlorra", "fedlora+part", "legend+", "+parts"])
def test_a_method_that_does_not_exist_is_refused_before_anything_runs(method: str) -> None:
    with pytest.raises(KeyError, match="legend-paper"):
        settings_of(method, layer_count=6)
