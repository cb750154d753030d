"Adapters over layers that bitsandbytes and torchao quantised, against the same weights in full precision."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from quantised_bases import BASES

EXTRAS = Path(sys.prefix) / "extras"  # where the Makefile puts the libraries
INFERENCE_ONLY = "torchao, 8 bits, inputs too"
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def found():
    if not (EXTRAS / "bitsandbytes").is_dir() or not (EXTRAS / "torchao").is_dir():
        pytest.skip("bitsandbytes and torchao are not installed aside; `make` does it")
    paths = os.pathsep.join([*sys.path, str(EXTRAS)])
    script = [sys.executable, Path(__file__).with_name("quantised_bases.py")]
    run = subprocess.run(script, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("method", ("lora", "dora"))
@pytest.mark.parametrize("base", [base for base in BASES if base != INFERENCE_ONLY])
def test_an_adapter_over_quantised_layers(base, method, found):
    result = found[f"{base}: {method}"]
    assert "error" not in result, result["error"]
    assert 0.005 < result["quantised"] < 0.5  # the weights are quantised indeed
    assert result["start"] == result["loaded"] == 0 and result["copied"] and result["unmerged"]
    assert result["output"] < 1e-5 and result["merged"] < 1e-5 and result["plain"]
    assert result["gradient"] < 1e-5 and result["removed"] == 0


@pytest.mark.parametrize("method", ("lora", "dora"))
def test_layers_for_inference_only_are_refused(method, found):
    error = found[f"{INFERENCE_ONLY}: {method}"]["error"]
    assert error.startswith("ValueError: 'model.layers.0.self_attn.q_proj'") and "inference only" in error


@pytest.mark.parametrize("form", ("4 bits", "8 bits", "torchao"))
def test_trainer_trains_it_and_a_merged_model_is_an_ordinary_checkpoint(form, found):
    result = found[f"transformers, {form}"]
    assert result["losses"][1] < result["losses"][0] and result["resumed"] == 0
    assert result["checkpoint"] < 1e-5 and result["clean"] and result["restored"]


def test_weights_packed_for_inference_are_refused(found):
    "Where the processor makes bitsandbytes pack them."
    error = found["packed"]
    assert error is None or "was packed by bitsandbytes" in error
