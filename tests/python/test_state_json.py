"""Typed JSON: every value comes back equal and of the same type, or is refused by name."""

from __future__ import annotations

import collections
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillframe._core.state_json import Encoder, decode, dumps
from stillframe.errors import DataLoss, InvalidArgument


def encode(value: Any, **options: Any) -> Any:
    """As it stands in the file: through the JSON text."""

    def no_tensors(path: str, tensor: Any) -> str:
        raise AssertionError(path)

    return json.loads(dumps(Encoder(no_tensors, **options).encode(value, "extra")))


def round_trip(value: Any, **options: Any) -> Any:
    def no_tensors(name: str) -> Any:
        raise AssertionError(name)

    return decode(encode(value, **options), "extra", tensor=no_tensors, **options)


def same(a: Any, b: Any) -> bool:
    """Equality that sees types, NaN and the sign of zero."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and str(a) == str(b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a.keys()), list(b.keys())) and same(list(a.values()), list(b.values()))
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    return bool(a == b)


text = st.text(st.characters(exclude_categories=["Cs"]))
hashable = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), text, st.binary()
)
leaves = st.one_of(
    hashable,
    st.floats(),
    st.sets(st.integers()),
    st.sampled_from([torch.float32, torch.int8, torch.bfloat16]),
    st.lists(st.integers(0, 9), max_size=4).map(torch.Size),
    st.sampled_from([torch.device("cpu"), torch.device("cuda", 1)]),
    st.floats(width=32).map(np.float32),
    st.integers(-128, 127).map(np.int8),
    st.booleans().map(np.bool_),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(text, inner),
        st.dictionaries(st.one_of(hashable, st.tuples(st.integers(), text)), inner),
        st.dictionaries(hashable, inner).map(collections.OrderedDict),
        st.dictionaries(hashable, st.integers()).map(collections.Counter),
    ),
    max_leaves=20,
)


@given(values)
def test_a_value_comes_back_equal_and_of_the_same_type(value: Any) -> None:
    back = round_trip(value)
    if isinstance(value, np.floating) and np.isnan(value):
        assert type(back) is type(value)
        assert np.isnan(back)
    else:
        assert same(value, back) or _has_numpy_nan(value)


def _has_numpy_nan(value: Any) -> bool:
    if isinstance(value, np.floating):
        return bool(np.isnan(value))
    if isinstance(value, dict):
        return any(map(_has_numpy_nan, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_has_numpy_nan, value))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.array([1, 2], dtype=">i4"),
        np.array([], dtype=np.int64).reshape(0, 3),
        np.array(1.5),
        np.array([True, False]),
        np.array([1 + 2j]),
    ],
    ids=["transposed", "big-endian", "empty", "0-d", "bool", "complex"],
)
def test_an_array_comes_back_with_shape_and_dtype(array: np.ndarray[Any, Any]) -> None:
    back = round_trip(array)
    assert back.shape == array.shape
    assert back.dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(back, array)
    back[...] = 0  # It owns its memory.


def test_an_ordered_dict_stays_one_in_its_order() -> None:
    value = collections.OrderedDict([("b", 1), (2, collections.OrderedDict())])
    back = round_trip(value)
    assert type(back) is collections.OrderedDict
    assert list(back.items()) == list(value.items())
    assert type(back[2]) is collections.OrderedDict


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"foo": [1, 2, 3, object()]}, "extra.foo[3]"),
        ({"foo": {"b a": open}}, 'extra.foo["b a"]'),
        ({1: collections.deque()}, "extra[1]"),
        ([collections.namedtuple("P", "x")(1)], "extra[0]"),
        ((np.datetime64("2020"),), "extra[0]"),
        ({"f": np.array([None])}, "extra.f"),
        ({"s": "\ud800"}, "extra.s"),
        ({"n": 1 << 20_000}, "extra.n"),
        ({"c": 1j}, "extra.c"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_without_a_form_is_named_by_its_path(value: Any, path: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        encode(value)
    assert str(caught.value).startswith(path)


def test_the_refusal_names_the_opt_in() -> None:
    with pytest.raises(InvalidArgument, match="allow_pickle=True"):
        encode({"when": object()})


def test_a_pickle_is_written_and_read_only_when_asked_for() -> None:
    value = {"c": 1j}
    assert round_trip(value, allow_pickle=True) == value
    with pytest.raises(InvalidArgument, match=r"extra\.c .*any code"):
        decode(encode(value, allow_pickle=True), "extra", tensor=str)


def test_what_contains_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(InvalidArgument, match="nested deeper"):
        encode(value)


@pytest.mark.parametrize(
    "damaged",
    [
        {"$unknown": 1},
        {"$bytes": 1},
        {"$bytes": "é"},
        {"$tuple": [1], "$set": []},
        {"$tuple": {}},
        {"$float": "nan"},
        {"$dict": [[1]]},
        {"$dict": [[[], 1]]},
        {"$scalar": ["object", 1]},
        {"$scalar": ["int8", 1000]},
        {"$array": {"dtype": "float32", "shape": [3], "data": "AAAA"}},
        {"$array": {"dtype": "O", "shape": [0], "data": ""}},
        {"$dtype": "Tensor"},
        {"$device": "toaster"},
        {"$size": "ab"},
    ],
    ids=str,
)
def test_typed_json_of_another_form_is_data_loss(damaged: Any) -> None:
    with pytest.raises(DataLoss, match=r"state\.json: extra"):
        decode(damaged, "extra", tensor=str)


def test_keys_that_could_be_mistaken_keep_their_types() -> None:
    value = {"$tuple": [1], 1: "a", "1": "b", None: "c", (1, "x"): "d"}
    assert same(round_trip(value), value)
