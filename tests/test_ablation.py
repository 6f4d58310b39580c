"""Ablations from end to end, with so little training that their figures mean nothing."""

import dataclasses
import functools
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import ablation
import ablation_runs
import calling
import processes
import pytest
import yaml
from ablation_budget import passes_text, step_passes, total_passes
from ablation_report import figure, ratio_to_teacher, remarks
from ablation_runs import Run, few_step_levels, plan, status
from calling import outlast_a_signal
from processes import parallel

from cm_diffusers import ConsistencyConfig, ConsistencyTrainer
from cm_diffusers.schedulers import ConsistencyScheduler
from cm_diffusers.training.methods import METHODS

TINY = dataclasses.replace(
    ablation.SETTINGS["digits"], channels=(8,), teacher_steps=20, teacher_batch=64, num_images=50
)
OWN = {
    "fast": {"method": "ct", "distance": "l2", "s1": 8, "batch_size": 16},
    "slow": {"method": "cd", "distance": "pseudo_huber", "num_levels": 6, "batch_size": 16},
}


def command(monkeypatch, folder, *arguments, runs=OWN, setting=TINY):
    """Run the command on tiny digits, in `folder`."""
    monkeypatch.setenv("CM_DIFFUSERS_CACHE", str(folder / "cache"))
    monkeypatch.setitem(ablation.SETTINGS, "digits", setting)
    monkeypatch.setattr(ablation_runs, "TEACHER_SAMPLERS", (("euler", 2), ("heun", 3)))
    fit = functools.partial(ablation_runs.DomainClassifier.fit, steps=10)
    monkeypatch.setattr(ablation_runs.DomainClassifier, "fit", fit)
    (folder / "own.yaml").write_text(yaml.safe_dump(runs))
    options = ["--runs", str(folder / "own.yaml"), "--output_dir", str(folder), "--budget", "0.5", *arguments]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *options])
    ablation.main()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a study of two runs and two seeds."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as monkeypatch:
        command(monkeypatch, folder, "--seeds", "0", "1")
    return folder


@pytest.fixture
def study(done, tmp_path, monkeypatch):
    """`study(*arguments, runs=OWN)`: run the command in `tmp_path`, where classifier and teachers are."""
    shutil.copytree(done, tmp_path, ignore=shutil.ignore_patterns("own"), dirs_exist_ok=True)
    return functools.partial(command, monkeypatch, tmp_path)


def results(folder):
    return {file.stem: json.loads(file.read_text()) for file in (folder / "digits" / "own" / "results").glob("*.json")}


# What a run may cost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "passes"),
    [
        ({"method": "cd"}, 3 + 1 + 2),
        ({"method": "cd", "solver": "euler"}, 3 + 1 + 1),
        ({"method": "cd", "guidance_scale": 2.0, "null_class_label": 3}, 3 + 1 + 4),
        ({"method": "cd", "adversarial_weight": 0.1}, 3 + 1 + 2 + 3),
        ({"method": "ct"}, 3 + 1),
        ({"method": "ct", "target": "student"}, 3 + 1),
        ({"method": "sct"}, 3 + 2),
        ({"method": "scd"}, 3 + 2 + 1),
    ],
)
def test_a_step_costs_its_passes(fields, passes):
    assert step_passes(ConsistencyConfig(**fields).resolve()) == passes


def test_the_second_stage_asks_the_first_too():
    config = ConsistencyConfig(method="tcm", max_train_steps=10, batch_size=1, first_stage_steps=6).resolve()
    assert [step_passes(config, step) for step in (0, 5, 6, 9)] == [4, 4, 5, 5]
    assert total_passes(config, 0, 5) == 5 * 4
    assert total_passes(config, 0, 10) == 6 * 4 + 4 * 5
    assert passes_text(config) == "4, then 5"


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
    assert all(min(abs(scheduler.grid - sigma)) < 1e-5 for sigma in levels["4"])
    assert levels["4"][1:] == pytest.approx([3.2, 0.8, 0.2], rel=0.4)


@pytest.mark.parametrize("num_levels", [2, 3, 4, 5])
def test_small_grids_have_the_steps_that_they_have(num_levels):
    config = plan(TINY, {**OWN["slow"], "num_levels": num_levels}, 3)
    known = config.few_step_sigmas or {}
    assert sorted(known) == {2: [], 3: ["2"], 4: ["2"], 5: ["2", "4"]}[num_levels]
    assert all(len(set(sigmas)) == int(steps) for steps, sigmas in known.items())


# What is compared ---------------------------------------------------------------------------------------------------


def test_the_study_of_methods_takes_all_and_replaces_lpips_alone():
    runs = ablation.study_runs("methods", TINY)
    assert set(runs) == set(METHODS) - {"lcm"}
    for name, fields in runs.items():
        config = plan(TINY, fields, 10)
        assert config.distance != "lpips"
        if METHODS[name].get("distance") != "lpips":
            assert fields == {"method": name}


@pytest.mark.parametrize("study", ablation.STUDIES[1:])
def test_a_study_varies_one_choice(study):
    runs = ablation.study_runs(study, TINY)
    varied = {name for fields in runs.values() for name in fields if fields[name] != next(iter(runs.values()))[name]}
    several = {
        "metric": {"distance", "huber_c"}, "solver": {"solver", "num_levels"},
        "data_terms": {"real_data", "adversarial_weight"},
    }  # fmt: skip
    assert varied == several.get(study, {study})
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
    assert not (tmp_path / "digits" / "own").exists()


# Studies ------------------------------------------------------------------------------------------------------------


def test_a_study_leaves_a_table_and_plots(done):
    folder = done / "digits" / "own"
    text = (folder / "report.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("|")}
    assert rows["fast"][1:3] == ["4", "28"]
    assert rows["slow"][1] == "6"
    assert all("±" in cell for cell in (*rows["fast"][3:6], rows["fast"][7]))
    assert rows["fast"][6].count(" ×") == 3
    assert "1,920 forward passes" in text
    assert "64 of a small classifier of digits" in text
    assert {"DDIM", "Heun"} <= rows.keys()
    assert all((folder / name).stat().st_size > 10_000 for name in ("training.png", "steps.png"))
    assert (folder / "samples.png").exists()


def test_a_study_leaves_a_result_and_a_student_of_each_run_and_seed(done):
    found = results(done)
    assert sorted(found) == ["fast-seed-0", "fast-seed-1", "slow-seed-0", "slow-seed-1"]
    for result in found.values():
        assert list(result["fid"]) == ["1", "2", "4"]
        assert len(result["curve"]) in (5, 6)
        assert result["curve"][-1]["step"] == result["steps"] + result["conversion_steps"]
        assert result["curve"][-1]["passes"] <= 1920
        assert result["curve"][-1]["fid"] == result["fid"]["1"]
    folder = done / "digits" / "own" / "runs"
    assert not list(folder.glob("*/checkpoints"))
    assert len(list(folder.glob("*/model_index.json"))) == 4


def test_what_is_done_is_not_done_again(done, tmp_path, monkeypatch):
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    report = tmp_path / "digits" / "own" / "report.md"
    report.unlink()
    for name in ("train_teacher", "teacher_sampler", "ConsistencyTrainer"):
        monkeypatch.setattr(ablation_runs, name, None)
    command(monkeypatch, tmp_path, "--seeds", "0", "1")
    assert report.read_text() == (done / "digits" / "own" / "report.md").read_text()


def test_a_study_that_is_killed_ends_as_one_that_is_not(done, study, tmp_path, monkeypatch):
    advance, started = ConsistencyTrainer.advance, []

    def killed(trainer, *arguments):
        if trainer.config.method == "cd" and trainer.step == 13:
            raise KeyboardInterrupt
        return advance(trainer, *arguments)

    def watched(trainer, *arguments):
        started.append((trainer.config.method, trainer.step))
        return advance(trainer, *arguments)

    monkeypatch.setattr(ConsistencyTrainer, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        study()
    assert list(results(tmp_path)) == ["fast-seed-0"]
    monkeypatch.setattr(ConsistencyTrainer, "advance", watched)
    study()
    assert started[0] == ("cd", 12)
    whole = results(done)
    for name, result in results(tmp_path).items():
        assert {**result, "seconds": 0} == {**whole[name], "seconds": 0}


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


def test_results_of_another_budget_are_not_mixed_in(done, tmp_path, monkeypatch, capsys):
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path, "--budget", "0.6")
    assert "max_train_steps was 28 and is 33" in capsys.readouterr().err


def test_a_teacher_of_other_settings_is_not_taken(study, capsys):
    with pytest.raises(SystemExit):
        study("--budget", "1", setting=dataclasses.replace(TINY, teacher_steps=10))
    assert "steps was 20 and is 10" in capsys.readouterr().err


def test_results_come_from_several_processes(tmp_path):
    found = parallel(math.sqrt, [4.0, 9.0, 16.0], 2, tmp_path)
    assert sorted(found) == [2.0, 3.0, 4.0]
    assert list(tmp_path.glob("worker-*.log"))


def test_a_process_that_is_killed_does_not_let_the_others_wait_for_it(tmp_path, study, monkeypatch):
    kill = [signal.SIGKILL] * 2
    with pytest.raises(BrokenProcessPool):
        list(parallel(signal.raise_signal, kill, 2, tmp_path))
    monkeypatch.setattr(ablation, "carry_out", lambda *_: list(parallel(signal.raise_signal, kill, 2, tmp_path)))
    with pytest.raises(SystemExit, match="Start again"):
        study()


def test_processes_end_with_their_caller_while_others_have_nothing_to_do(tmp_path):
    found = parallel(outlast_a_signal, [0, 300], 2, tmp_path)
    assert next(found) == 0
    time.sleep(1)  # until the first waits for a task
    found.close()
    assert not multiprocessing.active_children()


def test_processes_end_with_their_caller(tmp_path):
    found = parallel(os.system, ["true", f"sleep 20; touch {tmp_path}/slept", "true"], 2, tmp_path)
    assert next(found) == 0
    found.close()
    assert not multiprocessing.active_children()
    assert not (tmp_path / "slept").exists()


@pytest.mark.parametrize("signals", [[signal.SIGTERM] * 3, [signal.SIGINT, signal.SIGTERM] * 2, [signal.SIGKILL]])
def test_processes_end_with_a_caller_whatever_ends_it(tmp_path, signals):
    environment = {**os.environ, "PYTHONPATH": str(Path(processes.__file__).parent)}
    arguments = [sys.executable, calling.__file__, tmp_path]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as caller:
        assert caller.stdout.read(5) == b"ready"
        time.sleep(1)  # until one waits for a task
        for number in signals:
            caller.send_signal(number)
        # The pipe ends with the last of those who hold it.
        assert caller.communicate(timeout=60)[0] == b""
    assert caller.returncode == 75 if set(signals) == {signal.SIGTERM} else caller.returncode != 0


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


def test_a_student_is_compared_with_its_own_teacher():
    teachers = {0: [{"fid": 2.0}, {"fid": 9.0}], 1: [{"fid": 4.0}]}
    assert ratio_to_teacher({0: 2.0, 1: 8.0}, teachers) == "1.50 ×"
    assert ratio_to_teacher({}, teachers) == "-"


def test_names_of_results_do_not_change(tmp_path):
    run = Run("cd", 3, ConsistencyConfig(), TINY, tmp_path / "digits", "methods")
    assert run.result_file == tmp_path / "digits" / "methods" / "results" / "cd-seed-3.json"
