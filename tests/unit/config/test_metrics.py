"""Metrics: refused by type and shape, without looking at a value; a number is one in whatever library it is made."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpointer.config.metrics import accept_metrics, check_metrics, read_metrics
from checkpointer.errors import ConfigError


class OnDevice(torch.Tensor):
    """A tensor that counts how often its value was asked for: on a GPU, each time is a wait."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asks = {"item", "__float__", "__bool__", "__int__", "__index__", "tolist", "numpy", "isnan", "isfinite"}
        if getattr(func, "__name__", "") in {*asks, "__array__", "cpu", "equal", "eq", "__eq__", "__format__"}:
            OnDevice.reads += 1
        return super().__torch_function__(func, types, args, kwargs or {})


class Lazy:
    """A number of a library that nobody knows here."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def __float__(self) -> float:
        if self.error is not None:
            raise self.error
        return 0.5


@given(st.dictionaries(st.text(), st.floats() | st.integers(-(10**300), 10**300) | st.booleans()))
def test_metrics_are_floats_under_their_names(metrics: dict[str, float]) -> None:
    found = check_metrics(metrics)
    assert list(found) == list(metrics)
    assert all(type(value) is float for value in found.values())
    assert all(found[name] == float(value) or math.isnan(value) for name, value in metrics.items())


@pytest.mark.parametrize(
    "value",
    [
        *(
            np.float32(0.5),
            np.float64(0.5),
            np.longdouble(0.5),
            np.array(0.5),
            np.array([[0.5]]),
            np.array([0.5, 1])[:1],
        ),
        *(torch.tensor(0.5), torch.tensor([[0.5]]), torch.tensor(0.5, dtype=torch.bfloat16)),
        *(torch.tensor(0.5, requires_grad=True), torch.nn.Parameter(torch.tensor([0.5]))),
        *(Decimal("0.5"), Fraction(1, 2), Lazy()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_metric_is_one_number_of_any_library(value: Any) -> None:
    assert check_metrics({"loss": value}) == {"loss": 0.5}


@pytest.mark.parametrize("value", [np.bool_(True), np.array([True]), torch.tensor(True), np.uint64(1), torch.tensor(1)])
def test_whole_numbers_and_truth_are_numbers_too(value: Any) -> None:
    assert check_metrics({"hit": value}) == {"hit": 1.0}


def test_none_is_a_metric_that_was_not_reported():
    assert check_metrics({"loss": 1, "val_loss": None}) == {"loss": 1.0}
    assert check_metrics(None) == check_metrics({}) == check_metrics({"val_loss": None}) == {}


def test_nothing_is_read_before_it_is_recorded():
    tensor = torch.tensor([0.5]).as_subclass(OnDevice)
    OnDevice.reads = 0
    accepted = accept_metrics({"loss": tensor, "lazy": Lazy(ZeroDivisionError("read"))})
    assert OnDevice.reads == 0
    assert read_metrics({"loss": accepted["loss"]}) == {"loss": 0.5}
    assert OnDevice.reads == 1


@pytest.mark.parametrize(
    "value",
    [
        *(
            "0.5",
            b"1",
            np.str_("1"),
            np.array("0.5"),
            [0.5],
            (0.5,),
            {0.5},
            object(),
            float,
            torch.Tensor,
            Lazy().__float__,
        ),
        *(1j, np.complex64(1), np.array([1j]), torch.tensor(1j)),
        *(torch.ones(2), np.ones((2, 1)), torch.zeros(0), np.zeros(0)),
        *(np.array([Decimal(1)]), np.datetime64("2020-01-01"), np.array([(1.0,)], dtype=[("a", float)])),
        *(torch.tensor(1.0, device="meta"), Decimal("sNaN")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_metric_is_refused_by_name_and_type_before_anything_is_read(value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^metric 'loss' must be a number, got {type(value).__name__}"):
        accept_metrics({"acc": 1.0, "loss": value})


def test_a_refusal_says_what_to_give_instead():
    with pytest.raises(ConfigError, match=r"got Tensor of shape \(2, 3\): a metric is one number, such as their mean"):
        accept_metrics({"loss": torch.ones(2, 3)})
    with pytest.raises(ConfigError, match="got dict: give each of its numbers a name of its own, such as 'eval/loss'"):
        accept_metrics({"eval": {"loss": 0.5}})


@pytest.mark.parametrize(
    "value",
    [10**5000, -(10**400), Fraction(10**400), Fraction(10**5000), Decimal("1e400"), Decimal("-1e400")],
    ids=["too long to print", "long", "fraction", "long fraction", "decimal", "negative"],
)
def test_a_number_that_no_float_holds_is_refused_and_never_infinite(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^metric 'loss' is too large for a float: "):
        accept_metrics({"loss": value})


@pytest.mark.parametrize(
    "value", [math.inf, -math.inf, np.float32("inf"), torch.tensor(math.inf), Decimal("-Infinity")]
)
def test_infinity_is_a_value_like_any_other(value: Any) -> None:
    assert check_metrics({"loss": value}) == {"loss": float(value)}


def test_what_cannot_be_read_keeps_its_reason():
    error = RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(ConfigError, match=r"^metric 'loss', a Lazy, cannot be read as a number: .*assert") as caught:
        check_metrics({"loss": Lazy(error)})
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "metrics, message", [([("a", 1)], "must be a mapping .* got list"), ({1: 2.0}, "must be strings, got 1")]
)
def test_metrics_that_are_no_mapping_of_names_are_refused(metrics: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        accept_metrics(metrics)
