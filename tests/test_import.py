"""Importing the package costs nothing that is not used; each statement runs in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cm_diffusers


def modules_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_bare_import_loads_nothing_heavy() -> None:
    heavy = {"torch", "diffusers", "lpips", "datasets", "matplotlib", "transformers"}
    assert modules_after("import cm_diffusers") & heavy == set()


def test_pipeline_import_loads_no_training() -> None:
    loaded = modules_after("from cm_diffusers import ConsistencyPipeline")
    assert "cm_diffusers.pipelines" in loaded
    assert loaded & {"lpips", "datasets", "matplotlib", "tensorboard", "cm_diffusers.training"} == set()


def test_misspelt_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="ConsistencyPipelin"):
        cm_diffusers.ConsistencyPipelin  # noqa: B018


def test_public_names_are_listed() -> None:
    assert {"ConsistencyScheduler", "ConsistencyPipeline", "ConsistencyTrainer"} <= set(dir(cm_diffusers))
