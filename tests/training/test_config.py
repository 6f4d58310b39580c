import dataclasses
from pathlib import Path

import pytest

from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.methods import METHODS

EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"


@pytest.mark.parametrize("method", METHODS)
def test_resolving_fills_in_the_methods_choices(method):
    config = ConsistencyConfig(method=method).resolve()
    for name, value in METHODS[method].items():
        assert getattr(config, name) == value


def test_choices_can_be_overridden_one_by_one():
    config = ConsistencyConfig(method="cd", distance="l1", num_levels=7).resolve()
    assert (config.distance, config.num_levels, config.solver) == ("l1", 7, "heun")


def test_a_constant_stays_with_the_distance_that_it_is_of():
    assert ConsistencyConfig(method="lcm").resolve().huber_c == 0.001
    assert ConsistencyConfig(method="lcm", distance="huber").resolve().huber_c == 0.001
    assert ConsistencyConfig(method="lcm", distance="pseudo_huber").resolve().huber_c is None


@pytest.mark.parametrize(("method", "limit"), [("cd", "scd"), ("ecd", "scd"), ("ict", "sct")])
def test_a_methods_continuous_limit(method, limit):
    found = ConsistencyConfig(method=method, levels="continuous").resolve().to_dict()
    expected = ConsistencyConfig(method=limit).resolve().to_dict()
    assert {**found, "method": limit} == expected


def test_unknown_key_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="'learning_rat'.*Did you mean 'learning_rate'"):
        ConsistencyConfig.from_dict({"learning_rat": 1})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"num_levels": 1}, "num_levels.*2"),
        ({"method": "cdd"}, "method.*cd, ct"),
        ({"distance": "l3"}, "distance.*pseudo_huber"),
        ({"learning_rate": 0}, "learning_rate.*positive"),
        ({"learning_rate": "fast"}, "learning_rate.*float"),
        ({"batch_size": 2.5}, "batch_size.*int"),
        ({"batch_size": True}, "batch_size.*int"),
        ({"batch_size": None}, "batch_size"),
        ({"mu": 1.0}, "mu"),
        ({"sigma_min": 2, "sigma_max": 1}, "sigma_min < sigma_max"),
        ({"random_flip": "perhaps"}, "random_flip.*bool"),
        ({"adam_betas": [0.9]}, "adam_betas"),
        ({"s0": 10, "s1": 4}, "s1"),
    ],
)
def test_bad_values_are_refused_by_name(values, named):
    with pytest.raises(ValueError, match=named):
        ConsistencyConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"levels": "doubling"},
        {"levels": "progressive", "s0": 2},
        {"method": "ct", "levels": "fixed"},
        {"mu_schedule": "progressive"},
        {"guidance_scale": 2.0},
        {"method": "ct", "guidance_scale": 2.0, "null_class_label": 1},
        {"label_dropout": 0.1},
        {"method": "ct", "source": "teacher"},
        {"method": "ct", "s0": 1},
        {"method": "ect", "stages": 21},
        {"method": "ect", "mapping_base": 256.0, "stages": 3},
        {"method": "lcm", "level_distribution": "lognormal", "p_mean": 0.0, "p_std": 1.0},
        {"method": "lcm", "mu_schedule": "progressive", "s0": 2},
    ],
)
def test_choices_that_do_not_go_together_are_refused(values):
    with pytest.raises(ValueError):
        ConsistencyConfig(**values).resolve()


def test_yaml_round_trip(tmp_path):
    import yaml

    config = ConsistencyConfig(learning_rate=3e-5, few_step_sigmas={2: [80, 1]}, sample_nfes=[1, 4])
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert ConsistencyConfig.from_yaml(tmp_path / "c.yaml") == config


def test_yaml_scientific_notation_without_a_point_is_a_number(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-5\nmixed_precision: no\nema_rampup: null\n")
    config = ConsistencyConfig.from_yaml(tmp_path / "c.yaml", batch_size="8")
    assert (config.learning_rate, config.mixed_precision, config.ema_rampup, config.batch_size) == (
        1e-5,
        "no",
        None,
        8,
    )


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "!!python/object/apply:os.system ['true']"])
def test_files_that_are_no_config_are_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match="config file"):
        ConsistencyConfig.from_yaml(tmp_path / "c.yaml")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="absent.yaml"):
        ConsistencyConfig.from_yaml(tmp_path / "absent.yaml")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_valid(path):
    from_text = path.name.startswith("sd")
    ConsistencyConfig.from_yaml(path).resolve(from_text)


def test_every_field_has_help():
    assert all(len(spec.metadata["help"]) > 5 for spec in dataclasses.fields(ConsistencyConfig))


def test_defaults_are_not_shared():
    ConsistencyConfig().sample_nfes.append(99)
    assert ConsistencyConfig().sample_nfes == [1, 2]
