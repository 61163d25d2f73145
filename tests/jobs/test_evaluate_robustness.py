"""`python -m jobs.evaluate_robustness`: class folders in, a table out; bad input is one line and status 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import parse
from pipeline.errors import InputError
from pretrain.evals.robustness import RobustnessConfig, evaluate_robustness
from pretrain.model.artifacts import save_classifier
from pretrain.model.backbone import BackboneConfig
from pretrain.model.classifier import Classifier, ClassifierConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def places(tmp_path: Path, make_image_folder: Any) -> dict[str, str]:
    """A random classifier of the three classes of a small folder, that folder, and an output."""
    torch.manual_seed(0)
    backbone = BackboneConfig(image_size=16, patch_size=4, width=32, depth=1, heads=2)
    model = Classifier(ClassifierConfig(backbone=backbone, num_classes=3, head_init_scale=50.0))
    save_classifier(str(tmp_path / "classifier"), model, ["class-0", "class-1", "class-2"])
    return {
        "classifier": str(tmp_path / "classifier"),
        "clean": str(make_image_folder(classes=3, per_class=5, size=20)),
        "output": str(tmp_path / "out"),
    }


def test_the_command_line(places: dict[str, str], tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "jobs.evaluate_robustness", "--config", "jobs/configs/cifar10/robustness.yaml",
        *(f"--{name}={place}" for name, place in places.items()),
        "--severities", "1,3", "--shifted", f"same={places['clean']}", "--decode_threads", "1",
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    header = json.loads((tmp_path / "out" / "robustness.json").read_text())
    corruptions = ("gaussian_noise", "gaussian_blur", "contrast", "jpeg")
    expected = ["clean", "same", *(f"{name} {severity}" for name in corruptions for severity in (1, 3))]
    assert [row["name"] for row in header["result"]["rows"]] == expected
    assert header["table"] in ended.stdout and "15 in = 15 written" in ended.stdout
    assert header["files"] == {} and header["config"]["severities"] == "1,3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corruptions", "fog"], "corruptions names 'fog'"),
        (["--imagenet_r", "{clean}"], "does not know n01443537, "),
        (["--strengths", "mine", "--corruptions", "jpeg"], "strengths"),
    ],
)
def test_bad_input_is_an_error_and_nothing_is_written(
    places: dict[str, str], arguments: list[str], message: str
) -> None:
    words = [*(f"--{name}={place}" for name, place in places.items()), *arguments]
    with pytest.raises(InputError, match=message) as error:
        evaluate_robustness(parse(RobustnessConfig, [word.format(**places) for word in words]))
    assert "\n" not in str(error.value) and not Path(places["output"]).exists()
