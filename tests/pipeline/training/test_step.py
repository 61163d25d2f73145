from __future__ import annotations

import math

import pytest
import torch

from pipeline.training.step import NonFiniteLossError, RunningMeans, require_finite
from pipeline.training.worker import Worker


def test_means_are_weighted_and_reset() -> None:
    means = RunningMeans(torch.device("cpu"), "loss", "accuracy")
    means.add(3, loss=torch.tensor(1.0), accuracy=torch.tensor(0.5))
    means.add(1, loss=torch.tensor(5.0), accuracy=torch.tensor(0.1))
    assert all(math.isnan(mean) for mean in means.take().values())  # nothing is gathered yet
    means.gather(Worker())
    held = means.state_dict()
    assert means.take() == pytest.approx({"loss": 2.0, "accuracy": 0.4})
    means.add(2, loss=torch.tensor(7.0), accuracy=torch.tensor(0.25))
    means.gather(Worker())
    assert means.take() == {"loss": 7.0, "accuracy": 0.25}
    resumed = RunningMeans(torch.device("cpu"), "loss", "accuracy")
    resumed.load_state_dict(held)
    resumed.add(4, loss=torch.tensor(0.0), accuracy=torch.tensor(0.0))
    resumed.gather(Worker())
    assert resumed.take() == pytest.approx({"loss": 1.0, "accuracy": 0.2})


def test_nan_names_step_and_samples() -> None:
    require_finite({"loss": 1.0}, 5, ["a"])
    with pytest.raises(NonFiniteLossError, match=r"loss .*step 5.*k1"):
        require_finite({"loss": float("nan"), "lr": 1.0}, 5, ["k1", "k2"])
