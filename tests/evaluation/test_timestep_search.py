"""The search of few-step levels on functions whose minima are known, and the command that stores what it finds."""

import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import build_unet
from launching import TESTS, environment
from PIL import Image
from torch import nn

from cm_diffusers import ConsistencyPipeline, ConsistencyScheduler
from cm_diffusers.cli import main
from cm_diffusers.evaluation import Evaluator, Reference, load_features, student_sampler
from cm_diffusers.evaluation.timestep_search import (
    greedy_search,
    search_levels,
    store_levels,
    ternary_search,
    with_levels,
)
from cm_diffusers.hub import render_card
from cm_diffusers.noise_levels import karras_grid

FINE = karras_grid(1000, 0.002, 80.0).flip(0).tolist()
COARSE = karras_grid(18, 0.002, 80.0).flip(0).tolist()
BEST = (80.0, 0.821, 0.3, 0.1)
SPREAD = {2: [80.0, 24.4], 4: [80.0, 24.4, 5.84, 0.96]}


def distance_from_best(sigmas):
    """Has one minimum in each level, given those before it."""
    return 5 + sum(math.log(found / best) ** 2 for found, best in zip(sigmas, BEST, strict=False)) - len(sigmas)


class Watched:
    """`distance_from_best`, which remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, sigmas):
        self.asked.append(tuple(sigmas))
        return distance_from_best(sigmas)


# Searching


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 38, 100])
def test_ternary_search_finds_every_minimum_in_few_measurements(count):
    for lowest in range(count):
        asked = set()

        def measure(place, lowest=lowest, asked=asked):
            asked.add(place)
            return abs(place - lowest) + 0.5 * (place > lowest)

        assert ternary_search(measure, range(count)) == lowest
        assert len(asked) <= min(count, 2 * math.log(count) / math.log(1.5) + 3)


@pytest.mark.parametrize(("count", "most"), [(16, 8), (100, 16)])
def test_measurements_are_as_few_as_they_are_said_to_be(count, most):
    for seed in range(500):  # of figures that are nothing but noise
        noise, asked = random.Random(seed).sample(range(1000), count), set()
        ternary_search(lambda place, noise=noise, asked=asked: asked.add(place) or noise[place], range(count))
        assert len(asked) <= most


def test_levels_are_found_one_after_the_other():
    measure = Watched()
    found = dict(greedy_search(measure, FINE, SPREAD))
    assert list(found) == [2, 4]
    for steps, levels in found.items():
        # The candidates below sigma = 1 are 11 to 18 % apart.
        assert levels.sigmas == pytest.approx(BEST[:steps], rel=0.1)
        assert levels.fid == distance_from_best(levels.sigmas) < levels.fid_before
        assert levels.is_better and list(levels.sigmas_before) == SPREAD[steps]
        assert levels.fid_before == distance_from_best(SPREAD[steps])
    assert found[4].sigmas[:2] == found[2].sigmas
    assert len(measure.asked) <= 3 * 16 + 2


def test_a_coarse_grid_is_not_left():
    measure = Watched()
    (found,) = dict(greedy_search(measure, COARSE, {2: COARSE[::9]})).values()
    assert set(sum(measure.asked, ())) <= set(COARSE)
    nearest = min(COARSE, key=lambda sigma: abs(math.log(sigma / BEST[1])))
    assert found.sigmas == (COARSE[0], nearest)


@pytest.mark.parametrize("grid", [FINE, COARSE])
def test_nothing_is_measured_twice(grid):
    measure = Watched()
    # What is in force is on the grid, and off it by the rounding of single precision.
    before = {2: [80.0, float(np.float32(grid[8]))], 3: [80.0, grid[9], grid[12]]}
    dict(greedy_search(measure, grid, before))
    singles = [tuple(np.float32(sigmas).tolist()) for sigmas in measure.asked]
    assert len(set(singles)) == len(singles)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_found_is_the_best_that_was_measured(seed):
    noise, figures = random.Random(seed), {}
    search = greedy_search(lambda sigmas: figures.setdefault(tuple(sigmas), noise.random()), FINE, SPREAD)
    for steps, levels in search:
        assert levels.fid == min(figure for sigmas, figure in figures.items() if len(sigmas) == steps)
        assert levels.fid == figures[levels.sigmas] <= levels.fid_before
        assert levels.tried == sum(len(sigmas) == steps for sigmas in figures)


def test_levels_that_nothing_beats_stay_and_are_built_on():
    stored = [80.0, 0.821]
    found = dict(greedy_search(distance_from_best, COARSE, {2: stored, 3: [80.0, 24.4, 5.84]}))
    assert not found[2].is_better
    assert list(found[2].sigmas) == list(found[2].sigmas_before) == stored
    assert list(found[3].sigmas[:2]) == stored and found[3].is_better


def test_steps_that_the_grid_has_no_level_for_stay_as_they_are():
    grid = [80.0, 9.0, 0.8, 0.002]
    measure = Watched()
    found = dict(greedy_search(measure, grid, {2: grid[:2], 4: grid}))
    assert found[2].sigmas == (80.0, 0.8)
    assert (found[4].sigmas, found[4].tried, found[4].is_better) == (tuple(grid), 1, False)
    assert all(sigmas[-1] > 0.002 for sigmas in measure.asked if len(sigmas) < 4)


# A student


class Quarters(nn.Module):
    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CM_DIFFUSERS_CACHE", str(tmp_path / "cache"))


def student(stock=False, **config):
    if stock:
        scheduler = ConsistencyScheduler(num_train_timesteps=6, few_step_sigmas={"3": [80.0, 2.0, 1.0]})
    else:
        teacher = diffusers.DDPMScheduler(prediction_type="v_prediction")
        scheduler = ConsistencyScheduler.from_teacher(teacher, num_levels=6, few_step_sigmas={"3": [80.0, 2.0, 1.0]})
    return ConsistencyPipeline(build_unet(**config), scheduler, config.get("num_class_embeds") and 4)


@pytest.fixture
def evaluator():
    real = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Evaluator(load_features(Quarters()), Reference(real, "noise"), num_images=8)


def test_candidates_are_measured_as_they_will_be_drawn(evaluator):
    pipeline, told = student(), {}
    before = dict(pipeline.scheduler.config)
    (found,) = dict(
        search_levels(pipeline, evaluator, [2], watch=lambda s, fid: told.update({tuple(s): fid}))
    ).values()
    assert pipeline.scheduler.config == before
    assert set(sum(told, ())) <= {80.0, *pipeline.scheduler.grid.tolist()}
    assert found.fid == min(told.values()) and found.sigmas_before in told
    pipeline.scheduler = with_levels(pipeline.scheduler, {2: found.sigmas})
    pipeline.set_progress_bar_config(disable=True)
    assert evaluator.fid(student_sampler(pipeline, 2)) == pytest.approx(found.fid, rel=1e-6)
    assert evaluator.measure(student_sampler(pipeline, 2)).metrics["fid"] == pytest.approx(found.fid, rel=1e-6)


def test_a_guided_student_is_searched_under_its_guidance(evaluator):
    figures = [dict(search_levels(student(num_class_embeds=5), evaluator, [2], scale))[2].fid_before
               for scale in (1.0, 3.0)]  # fmt: skip
    assert figures[0] != figures[1]


@pytest.mark.parametrize(("steps", "message"), [([1, 2], r"at least 2, got \[1, 2\]"), ([], "at least 2"),
                                                ([2, 7], "exceeds the 6 levels")])  # fmt: skip
def test_steps_that_cannot_be_searched_are_refused_at_once(steps, message, evaluator):
    with pytest.raises(ValueError, match=message):
        search_levels(student(), evaluator, steps)


# Storing


@pytest.fixture(params=[True, False], ids=["stock", "ours"])
def folder(request, tmp_path):
    """A saved student, in either layout."""
    student(request.param).save_pretrained(tmp_path / "student")
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    assert index["_class_name"] == ("ConsistencyModelPipeline" if request.param else "ConsistencyPipeline")
    return tmp_path / "student"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_stored_levels_are_all_that_changes_and_are_used(folder):
    old = contents(folder)
    store_levels(folder, {2: (80.0, 0.5)})
    new = contents(folder)
    (changed,) = (path for path in new if new[path] != old.get(path))
    before, after = (json.loads(files[changed]) for files in (old, new))
    assert {**before, "few_step_sigmas": {"2": [80.0, 0.5], "3": [80.0, 2.0, 1.0]}} == after
    assert new.keys() == old.keys()
    pipeline = ConsistencyPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    stored, given = (
        pipeline(2, latents=noise, generator=torch.Generator().manual_seed(1), output_type="np", **how).images
        for how in ({"num_inference_steps": 2}, {"sigmas": [80.0, 0.5]})
    )
    assert np.array_equal(stored, given)
    pipeline.save_pretrained(folder.parent / "again")
    assert "2 steps at σ = 80, 0.5; 3 steps at σ = 80, 2, 1" in str(render_card(folder.parent / "again", "me/student"))


def test_levels_that_would_not_load_are_not_stored(folder):
    old = contents(folder)
    with pytest.raises(ValueError, match="sigma_max=80"):
        store_levels(folder, {2: (90.0, 0.5)})
    assert contents(folder) == old


def test_levels_are_stored_whole_or_not_at_all(folder, monkeypatch):
    old = contents(folder)
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)  # killed before all is written
    with pytest.raises(ZeroDivisionError):
        store_levels(folder, {2: (80.0, 0.5)})
    assert {path: data for path, data in contents(folder).items() if not path.name.endswith(".partial")} == old
    ConsistencyPipeline.from_pretrained(folder)


# The command


@pytest.fixture
def options(folder):
    """Options of the command; the images are the student's own in two steps, at the third level of its grid."""
    pipeline = ConsistencyPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = with_levels(pipeline.scheduler, {2: [80.0, pipeline.scheduler.grid[2]]})
    images = folder.parent / "images"
    images.mkdir()
    for index, pixels in enumerate(student_sampler(pipeline, 2).draw(range(8)).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels).save(images / f"{index}.png")
    return ["--dataset", str(images), "--features", "test_timestep_search:Quarters", "--num_images", "8"]


def stored(folder):
    return ConsistencyPipeline.from_pretrained(folder).scheduler.config.few_step_sigmas


def test_timesteps_finds_levels_and_stores_them(folder, options, capsys):
    command, old = ["timesteps", str(folder), *options, "--nfes", "2"], contents(folder)
    before, best = ConsistencyPipeline.from_pretrained(folder).scheduler.grid[[3, 2]]

    main([*command, "--dry_run"])
    assert "Nothing was stored (--dry_run)" in capsys.readouterr().out
    assert contents(folder) == old

    main(command)
    printed = capsys.readouterr().out
    assert f"2 steps at σ = 80, {before:.3g}: FID " in printed and f"| 2 | 80, {before:.3g} | " in printed
    assert f"| 80, {best:.3g} | " in printed and f"Stored in {folder}: with 2 steps" in printed
    assert stored(folder) == {"2": [80.0, pytest.approx(best)], "3": [80.0, 2.0, 1.0]}
    new = contents(folder)
    assert [path.name for path in new if new[path] != old[path]] == ["scheduler_config.json"]

    main(command)
    assert "Nothing better was found" in capsys.readouterr().out
    assert contents(folder) == new


def test_a_report_of_other_levels_is_not_this_student_s(folder, options):
    evaluate = ["evaluate", str(folder), *options, "--nfes", "2", "--output_dir", str(folder / "evaluation")]
    main(evaluate)
    assert "| student | multistep consistency | 2 |" in str(render_card(folder, "me/student"))
    main(["timesteps", str(folder), *options, "--nfes", "2"])
    with pytest.raises(SystemExit, match="has figures of another student, with other weights or another scheduler"):
        main(evaluate)
    card = str(render_card(folder, "me/student"))
    assert f"2 steps at σ = 80, {stored(folder)['2'][1]:.3g}" in card
    assert "multistep consistency" not in card and "Its quality has not been measured" in card


@pytest.mark.parametrize("folder", [False], indirect=True, ids=["ours"])
def test_processes_search_together_and_one_of_them_stores(folder, options):
    shutil.copytree(folder, folder.parent / "alone")
    command = [*options, "--nfes", "2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "cm_diffusers.cli", "timesteps", str(folder), *command], capture_output=True, text=True,
        env=environment(PYTHONPATH=f"{Path(__file__).parent}:{TESTS}:{TESTS.parent}"), timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    main(["timesteps", str(folder.parent / "alone"), *command])
    assert contents(folder) == contents(folder.parent / "alone")
    assert done.stdout.count("Stored in") == 1


@pytest.mark.parametrize("place", ["me/student", "no-such-folder"])
def test_levels_have_no_place_on_the_hub(place):
    with pytest.raises(SystemExit, match=f"{place} is no folder of a student.*hf download {place} --local-dir FOLDER"):
        main(["timesteps", place, "--dataset", "images"])


def test_what_cannot_be_searched_is_refused_before_the_images_are_read(tmp_path):
    student().save_pretrained(tmp_path / "student")
    with pytest.raises(SystemExit, match="`num_inference_steps=7` exceeds the 6 levels"):
        main(["timesteps", str(tmp_path / "student"), "--dataset", "no/images", "--nfes", "2", "7"])
    with pytest.raises(SystemExit, match="--nfes: must be a whole number of at least 2, got '1'"):
        main(["timesteps", str(tmp_path / "student"), "--dataset", "no/images", "--nfes", "1"])
