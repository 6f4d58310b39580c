"""Ablations from end to end, with so little training that their figures mean nothing."""

import dataclasses
import functools
import json
import math
import sys

import ablation
import ablation_runs
import pytest
import torch
import yaml
from ablation_report import figure, remarks
from ablation_runs import Run, changed, few_step_levels, plan, status, step_passes, total_passes

from cm_diffusers import ConsistencyConfig, ConsistencyTrainer
from cm_diffusers.schedulers import ConsistencyScheduler
from cm_diffusers.training.config import METHODS

TINY = dataclasses.replace(
    ablation.SETTINGS["digits"], channels=(8,), teacher_steps=20, teacher_batch=64, num_images=50
)
OWN = {
    "fast": {"method": "ct", "distance": "l2", "s1": 8, "batch_size": 16},
    "slow": {"method": "cd", "distance": "pseudo_huber", "num_levels": 6, "batch_size": 16},
}


@pytest.fixture
def study(tmp_path, monkeypatch, capsys):
    """`study(*arguments, runs=OWN)`: run the command on tiny digits; returns what it printed."""
    monkeypatch.setenv("CM_DIFFUSERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ablation.SETTINGS, "digits", TINY)
    monkeypatch.setattr(ablation_runs, "TEACHER_SAMPLERS", (("euler", 2), ("heun", 3)))
    fit = functools.partial(ablation_runs.DomainClassifier.fit, steps=10)
    monkeypatch.setattr(ablation_runs.DomainClassifier, "fit", fit)

    def run(*arguments, runs=OWN):
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(runs))
        command = ["--runs", str(tmp_path / "own.yaml"), "--output_dir", str(tmp_path), "--budget", "0.5", *arguments]
        monkeypatch.setattr(sys, "argv", ["ablation.py", *command])
        ablation.main()
        return capsys.readouterr().out

    return run


def results(folder):
    return {file.stem: json.loads(file.read_text()) for file in (folder / "digits" / "own" / "results").iterdir()}


# What a run may cost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "passes"),
    [
        ({"method": "cd"}, 3 + 1 + 2),
        ({"method": "cd", "solver": "euler"}, 3 + 1 + 1),
        ({"method": "cd", "guidance_scale": 2.0, "null_class_label": 3}, 3 + 1 + 4),
        ({"method": "ct"}, 3 + 1),
        ({"method": "ct", "target": "student"}, 3 + 1),
    ],
)
def test_a_step_costs_its_passes(fields, passes):
    assert step_passes(ConsistencyConfig(**fields).resolve()) == passes


def test_a_derivative_costs_two_passes_in_place_of_the_target():
    config = changed(ConsistencyConfig(), levels="continuous", source="teacher", solver=None)
    assert step_passes(config) == 3 + 2 + 1


def test_a_run_takes_all_steps_that_the_budget_allows():
    config = plan(TINY, {"method": "ct", "distance": "l2", "batch_size": 16}, budget=2)
    budget = 2 * 20 * 64 * 3
    converting = config.max_train_steps // 10
    assert total_passes(config, converting, 1) == 16 * (4 * converting + 4)
    assert total_passes(config, converting, config.max_train_steps) <= budget
    more = config.max_train_steps + 1
    assert total_passes(config, more // 10, more) > budget


def test_a_conversion_that_is_given_is_counted():
    config = plan(TINY, {**OWN["slow"], "conversion_steps": 30}, budget=1)
    assert config.max_train_steps == (20 * 64 * 3 - 16 * 30 * 4) // (16 * 6)


def test_steps_that_cost_less_are_more():
    steps = [plan(TINY, {**OWN["slow"], "solver": solver}, 3).max_train_steps for solver in ("euler", "heun")]
    assert steps[0] / steps[1] == pytest.approx(6.4 / 5.4, rel=0.02)


def test_a_budget_below_one_step_is_refused():
    with pytest.raises(ValueError, match="less than one step, which takes 640"):
        plan(TINY, {**OWN["slow"], "batch_size": 64}, budget=0.1)


def test_few_step_levels_are_of_the_grid_and_descend():
    scheduler = ConsistencyScheduler(
        family="vp", prediction_type="v_prediction", boundary="euler", num_train_timesteps=1000, num_levels=18,
        few_step_sigmas={"2": [80.0, 0.4]},
    )  # fmt: skip
    levels = few_step_levels(scheduler)
    assert levels["2"] == [80.0, 0.4]
    assert levels["4"] == sorted(set(levels["4"]), reverse=True)
    grid = scheduler._karras(torch.arange(18).numpy())
    assert all(min(abs(grid - sigma)) < 1e-5 for sigma in levels["4"])
    assert levels["4"][1:] == pytest.approx([6.4, 1.6, 0.4], rel=0.4)


@pytest.mark.parametrize("num_levels", [2, 3, 4, 5])
def test_small_grids_have_the_steps_that_they_have(num_levels):
    config = plan(TINY, {**OWN["slow"], "num_levels": num_levels}, 3)
    known = config.few_step_sigmas or {}
    assert sorted(known) == {2: [], 3: ["2"], 4: ["2"], 5: ["2", "4"]}[num_levels]
    assert all(len(set(sigmas)) == int(steps) for steps, sigmas in known.items())


# What is compared ---------------------------------------------------------------------------------------------------


def test_the_study_of_methods_takes_all_and_replaces_lpips_alone():
    runs = ablation.study_runs("methods", TINY)
    assert set(runs) == set(METHODS)
    for name, fields in runs.items():
        config = plan(TINY, fields, 10)
        assert config.distance != "lpips"
        if METHODS[name].get("distance") != "lpips":
            assert fields == {"method": name}


@pytest.mark.parametrize("study", ablation.STUDIES[1:])
def test_a_study_varies_one_choice(study):
    runs = ablation.study_runs(study, TINY)
    varied = {name for fields in runs.values() for name in fields if fields[name] != next(iter(runs.values()))[name]}
    assert varied == {"metric": {"distance"}, "solver": {"solver", "num_levels"}}.get(study, {study})
    assert all(plan(TINY, fields, 10).max_train_steps for fields in runs.values())


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (
            {"a": {"method": "cd", "num_level": 3}},
            "The run 'a': Unknown option 'num_level'. Did you mean 'num_levels'?",
        ),
        ({"a": {"max_train_steps": 3}}, "The run 'a': `max_train_steps` is set by the study"),
        ({"a": {"num_levels": 1}}, "The run 'a': `num_levels` must be at least 2"),
        ({"a": 3}, "must be a mapping"),
        ({"a/b": {}}, "cannot be a run's name"),
    ],
)
def test_own_runs_that_cannot_work_are_refused_at_the_start(study, tmp_path, capsys, runs, message):
    with pytest.raises(SystemExit) as stopped:
        study(runs=runs)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "digits").exists()


# Studies ------------------------------------------------------------------------------------------------------------


def test_a_study_leaves_a_table_plots_and_results_and_does_nothing_twice(study, tmp_path, monkeypatch):
    printed = study("--seeds", "0", "1")
    folder = tmp_path / "digits" / "own"
    assert "fast, seed 1: ok" in printed
    text = (folder / "report.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("|")}
    assert rows["fast"][1:3] == ["4", "28"]
    assert rows["slow"][1] == "6"
    assert all("±" in cell for cell in rows["fast"][3:7])
    assert "1,920 forward passes" in text
    assert "64 of a small classifier of digits" in text
    assert {"DDIM", "Heun"} <= rows.keys()
    assert all((folder / name).stat().st_size > 10_000 for name in ("training.png", "steps.png"))
    found = results(tmp_path)
    assert sorted(found) == ["fast-seed-0", "fast-seed-1", "slow-seed-0", "slow-seed-1"]
    assert [sorted(result["fid"]) for result in found.values()] == [["1", "2", "4"]] * 4
    for result in found.values():
        assert len(result["curve"]) == 5  # of six parts, rounded up
        assert result["curve"][-1]["step"] == result["steps"] + result["conversion_steps"]
        assert result["curve"][-1]["passes"] <= 1920
        assert result["curve"][-1]["fid"] == result["fid"]["1"]
    assert not list(folder.glob("runs/*/checkpoints"))
    assert (folder / "runs" / "slow-seed-1" / "model_index.json").exists()

    for name in ("measure_run", "train_teacher"):
        monkeypatch.setattr(ablation_runs, name, None)
    monkeypatch.setattr(ablation, "measure_run", None)
    (folder / "report.md").unlink()
    study("--seeds", "0", "1")
    assert (folder / "report.md").read_text() == text


def test_a_study_that_is_killed_ends_as_one_that_is_not(study, tmp_path, monkeypatch):
    study()
    whole = results(tmp_path)
    for file in (tmp_path / "digits" / "own" / "results").iterdir():
        file.unlink()
    advance = ConsistencyTrainer.advance

    def killed(trainer, *arguments):
        if trainer.config.method == "cd" and trainer.step == 13:
            raise KeyboardInterrupt
        return advance(trainer, *arguments)

    monkeypatch.setattr(ConsistencyTrainer, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        study()
    assert list(results(tmp_path)) == ["fast-seed-0"]

    started = []

    def watched(trainer, *arguments):
        started.append((trainer.config.method, trainer.step))
        return advance(trainer, *arguments)

    monkeypatch.setattr(ConsistencyTrainer, "advance", watched)
    study()
    assert started[0] == ("cd", 12)
    again = results(tmp_path)
    for name, result in whole.items():
        assert {**again[name], "seconds": 0} == {**result, "seconds": 0}


def test_a_run_that_fails_or_explodes_does_not_stop_the_others(study, tmp_path, monkeypatch):
    measure = ablation.measure_run

    def fragile(run):
        if run.name == "slow":
            raise MemoryError("out of it")
        return measure(run)

    monkeypatch.setattr(ablation, "measure_run", fragile)
    explodes = {**OWN["fast"], "learning_rate": 1e30, "max_grad_norm": 1e30}
    with pytest.raises(SystemExit, match="slow-seed-0 failed"):
        study(runs={**OWN, "explodes": explodes})
    text = (tmp_path / "digits" / "own" / "report.md").read_text()
    assert "failed (MemoryError): seed 0" in text
    assert "not finite: seed 0" in text
    assert results(tmp_path).keys() == {"fast-seed-0", "explodes-seed-0"}
    assert math.isfinite(results(tmp_path)["fast-seed-0"]["fid"]["1"])


def test_results_of_another_budget_or_teacher_are_not_mixed_in(study, monkeypatch, capsys):
    only = {"fast": OWN["fast"]}
    study(runs=only)
    with pytest.raises(SystemExit):
        study("--budget", "0.6", runs=only)
    assert "max_train_steps was 28 and is 33" in capsys.readouterr().err
    monkeypatch.setitem(ablation.SETTINGS, "digits", dataclasses.replace(TINY, teacher_steps=10))
    with pytest.raises(SystemExit):
        study("--budget", "1", runs={"other": OWN["fast"]})
    assert "steps was 20 and is 10" in capsys.readouterr().err


def test_results_come_from_several_processes(tmp_path):
    found = ablation.parallel(math.sqrt, [4.0, 9.0, 16.0], 2, tmp_path)
    assert sorted(found) == [2.0, 3.0, 4.0]
    assert list(tmp_path.glob("worker-*.log"))


# Figures ------------------------------------------------------------------------------------------------------------


def test_runs_that_got_worse_or_lost_their_numbers_are_marked():
    curve = [{"fid": 3.0}, {"fid": None}, {"fid": 2.0}]
    assert status(curve, {"1": 3.9, "2": 1.0}) == "ok"
    assert status(curve, {"1": 4.1, "2": 1.0}) == "diverged"
    assert status(curve, {"1": 2.0, "2": None}) == "not finite"
    assert status(curve, {}) == "not finite"
    found = {0: {"status": "ok"}, 2: {"status": "diverged"}}
    assert remarks(found, [0, 1, 2]) == "to come: seed 1; diverged: seed 2"


def test_figures_have_their_spread():
    assert figure([1.0, 2.0, 3.0]) == "2.000 ± 1.000"
    assert figure([1.5]) == "1.500"
    assert figure([]) == "-"


def test_names_of_results_do_not_change(tmp_path):
    run = Run("cd", 3, ConsistencyConfig(), TINY, tmp_path / "digits", "methods")
    assert run.result_file == tmp_path / "digits" / "methods" / "results" / "cd-seed-3.json"
