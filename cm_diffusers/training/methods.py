"""The methods by name: what each chooses, and what their noise levels cannot do without."""

from __future__ import annotations

from typing import Any

# A method is a choice of levels, source, target, distance and weighting; every choice can be overridden in the config.
_EASY = {
    "levels": "mapping", "stages": 8, "mapping_base": 2.0, "level_distribution": "lognormal", "p_mean": -1.1,
    "p_std": 2.0, "target": "student", "distance": "pseudo_huber", "weighting": "inverse_gap",
}  # fmt: skip
# A width of 1.4, as published, shows runs of some thousand steps hardly any of the noise that one-step samples start
# from: MeanFlow's would have twice the FID.
CONTINUOUS = {
    "levels": "continuous", "level_distribution": "lognormal", "p_mean": -1.0, "p_std": 2.0, "target": "student",
    "distance": "l2", "weighting": "adaptive",
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    # Song et al. 2023, algorithms 2 and 3
    "cd": {
        "levels": "fixed", "num_levels": 40, "level_distribution": "uniform",
        "source": "teacher", "solver": "heun", "target": "ema", "mu": 0.95, "mu_schedule": "fixed",
        "distance": "lpips", "weighting": "uniform",
    },
    "ct": {
        "levels": "progressive", "s0": 2, "s1": 150, "level_distribution": "uniform",
        "source": "data", "target": "ema", "mu": 0.9, "mu_schedule": "progressive",
        "distance": "lpips", "weighting": "uniform",
    },
    # Song & Dhariwal 2023
    "ict": {
        "levels": "doubling", "s0": 10, "s1": 1280, "level_distribution": "lognormal", "p_mean": -1.1, "p_std": 2.0,
        "source": "data", "target": "student", "distance": "pseudo_huber", "weighting": "inverse_gap",
    },
    # Geng et al. 2024
    "ect": {**_EASY, "source": "data"},
    # A teacher's steps have no variance: pairs need not be as near as of data, if Heun bridges them.
    "ecd": {**_EASY, "stages": 5, "source": "teacher", "solver": "heun"},
    # Lee et al. 2024
    "tcm": {**_EASY, "source": "data", "truncation": 1.0},
    # Lu & Song 2024
    "sct": {**CONTINUOUS, "source": "data"},
    "scd": {**CONTINUOUS, "source": "teacher"},
    # Geng et al. 2025
    "meanflow": {
        **CONTINUOUS, "source": "data", "flow_map": True, "weighting": "uniform",
    },
    # Luo et al. 2023
    "lcm": {
        "levels": "skipping", "skip_interval": 20, "level_distribution": "uniform",
        "source": "teacher", "solver": "euler", "target": "ema", "mu": 0.95, "mu_schedule": "fixed",
        "distance": "huber", "huber_c": 0.001, "weighting": "uniform", "boundary": "lcm", "conversion_steps": 0,
    },
}  # fmt: skip


# What each kind of levels cannot do without.
NEEDED_BY_LEVELS: dict[str, tuple[str, ...]] = {
    "fixed": ("num_levels",), "progressive": ("s0", "s1"), "doubling": ("s0", "s1"),
    "mapping": ("stages", "mapping_base"), "continuous": (), "skipping": ("skip_interval",),
}  # fmt: skip
