"""What goes through JSON and tensors comes back equal, of the same types; what could not is refused by its path."""

from __future__ import annotations

import collections
import enum
import math
import pathlib
import random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import CheckpointError
from paceline.trainer.checkpoint import decode, encode, load, save
from paceline.trainer.checkpoint.encode import tensor_names
from paceline.trainer.checkpoint.strict_json import read_json, write_json


def same(a: Any, b: Any) -> bool:
    """Equal in value, type, dtype, order of keys; a nan equals a nan."""
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        return a.resolve_conj().contiguous().view(-1).tolist().__repr__() == b.contiguous().view(-1).tolist().__repr__()
    if isinstance(a, (np.ndarray, np.generic)):
        return type(a) is type(b) and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(k, m) and same(v, n) for (k, v), (m, n) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def tensors() -> st.SearchStrategy[torch.Tensor]:
    def make(dtype: torch.dtype, shape: list[int], form: str) -> torch.Tensor:
        tensor = (torch.arange(math.prod(shape)) % 2).reshape(shape).to(dtype)
        if form == "transposed":
            return tensor.transpose(0, -1) if tensor.dim() else tensor
        if form == "strided" and tensor.dim():
            return tensor[::2]
        return tensor.conj() if form == "conjugated" else tensor

    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
    dtypes += [torch.uint16, torch.int8, torch.complex64, torch.complex128, torch.float8_e4m3fn]
    forms = st.sampled_from(["plain", "transposed", "strided", "conjugated"])
    return st.builds(make, st.sampled_from(dtypes), st.lists(st.integers(0, 3), max_size=3), forms)


def arrays() -> st.SearchStrategy[Any]:
    kinds = ["float64", "float32", "int32", "uint32", "bool", "complex64", "complex128", ">i4", ">f8"]
    shapes = st.lists(st.integers(0, 3), max_size=2).map(tuple)
    made = st.builds(lambda kind, shape: np.ones(shape, np.dtype(kind)), st.sampled_from(kinds), shapes)
    native = made.map(lambda a: a.T) | made.map(lambda a: a[::-1] if a.ndim else a)
    scalars = st.sampled_from([np.float64(0.1), np.float32("inf"), np.int64(-3), np.bool_(True), np.uint8(7)])
    return native | scalars


KEYS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.sampled_from([2**200, -(2**64), "$tensor", "\ud800", ""])
    | tensors()
    | arrays()
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.sampled_from(["$tuple", "$dict", "$float", "$tensor", "$"]), inner)
        | st.dictionaries(KEYS | st.tuples(KEYS, KEYS), inner, max_size=3)
    ),
    max_leaves=15,
)


def native(tree: Any) -> Any:
    """`tree` with NumPy arrays in this machine's byte order, which is how they load."""
    if isinstance(tree, np.ndarray):
        return tree.astype(tree.dtype.newbyteorder("="))
    if isinstance(tree, dict):
        return {key: native(value) for key, value in tree.items()}
    return type(tree)(map(native, tree)) if type(tree) in (list, tuple) else tree


@settings(max_examples=400, deadline=None)
@given(TREES)
def test_any_tree_comes_back_the_same(tree: Any) -> None:
    value, found = encode(tree)
    value = read_json(write_json(value), "here")
    assert set(tensor_names(value)) == set(found)
    assert same(decode(value, found), native(tree))


@settings(max_examples=40, deadline=None)
@given(TREES, TREES)
def test_any_tree_comes_back_the_same_through_files(state: Any, optimizer: Any) -> None:
    meta = {"global_step": 1, "epoch": 0}
    path = save("memory://encode/x", model={}, optimizer=optimizer, state=state, meta=meta)
    loaded = load(path)
    assert same(loaded.state, native(state)) and same(loaded.optimizer, native(optimizer))


def test_a_dict_whose_keys_are_tags_is_not_taken_for_a_tag() -> None:
    tree = {"$tuple": [1, 2], "x": {"$tensor": "y"}, "z": {"$float": "inf"}}
    assert decode(*encode(tree)) == tree


def test_the_generators_states_come_back_exactly() -> None:
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    restored = decode(*encode(states))
    for name, put_back, draw in (
        ("python", random.setstate, random.random),
        ("numpy", np.random.set_state, np.random.random),
        ("torch", torch.set_rng_state, lambda: torch.rand(1).item()),
    ):
        expected = draw()
        put_back(restored[name])
        assert draw() == expected, name


def test_subclasses_of_dict_load_as_dict() -> None:
    restored = decode(*encode({"a": collections.OrderedDict(x=1), "b": collections.Counter("aab")}))
    assert restored == {"a": {"x": 1}, "b": {"a": 2, "b": 1}}
    assert all(type(value) is dict for value in restored.values())


def test_parameters_load_as_tensors_and_two_paths_never_share_a_name() -> None:
    tree = {"a.b": torch.nn.Parameter(torch.ones(2)), "a": {"b": torch.zeros(2)}, "__metadata__": torch.ones(1)}
    value, found = encode(tree)
    assert len(found) == 3 and "__metadata__" not in found
    assert same(decode(value, found), tree)


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    HIGH = 1


class Point(NamedTuple):
    x: int


class Text(str):
    pass


@pytest.mark.parametrize(
    ("value", "kind", "advice"),
    [
        ({1, 2}, "set", "sorted"),
        (b"x", "bytes", "uint8 tensor"),
        (torch.Size([1]), "torch.Size", "tuple"),
        (Point(1), "Point", "tuple"),
        (torch.float32, "torch.dtype", "str(...)"),
        (torch.device("cpu"), "torch.device", "str(...)"),
        (pathlib.Path("x"), "Path", "str(...)"),
        (Color.RED, "Color", ".value"),
        (Level.HIGH, "Level", ".value"),
        (Text("x"), "Text", "str(...)"),
        (1j, "complex", "real and imaginary"),
        (torch.Generator(), "torch._C.Generator", "get_state()"),
        (torch.nn.Linear(1, 1), "Linear", "state_dict()"),
        (len, "builtin_function", "leave it out"),
        (object(), "object", "plain values"),
        (np.array(["text"]), "<U4", "list of text"),
        (np.array([object()]), "object", "list of text"),
        (np.ma.masked_array([1], [True]), "MaskedArray", "plain values"),
        (np.longdouble(1), "longdouble" if np.dtype("g").itemsize == 8 else "float128", "Convert"),
        (torch.empty(1, device="meta"), "meta", "no data"),
        (torch.eye(2).to_sparse(), "sparse", "to_dense"),
        pytest.param(10**5000, "integer", "as text", id="long integer"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_path_and_type_with_advice(value: Any, kind: str, advice: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        encode({"callbacks": {"MyCallback": {"history": [0, 1, 2, value]}}})
    message = str(refusal.value)
    assert message.startswith("callbacks.MyCallback.history[3] ")
    assert kind in message and advice in message


def test_a_key_that_cannot_be_stored_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"^a has the key .*RED.* of type .*Color"):
        encode({"a": {Color.RED: 1}})


def test_a_tree_that_contains_itself_is_refused() -> None:
    tree: dict[str, Any] = {}
    tree["me"] = tree
    with pytest.raises(CheckpointError, match="contains itself"):
        encode(tree)


@pytest.mark.parametrize(
    "value",
    [
        {"$tuple": 1},
        {"$tuple": [], "x": 1},
        {"$dict": [[1]]},
        {"$dict": [[[], 1]]},
        {"$float": "1e400"},
        {"$float": ["inf"]},
        {"$tensor": 3},
        {"$tensor": "absent"},
        {"$tensor": "here", "numpy": "object"},
        {"$tensor": "here", "numpy": "scalar"},
        {"$tensor": "here", "pickle": "x"},
        {"$run": "rm"},
        {"x": 1, "$other": 2},
        [[]] * 3 + [eval("[" * 150 + "]" * 150)],
    ],
)
def test_a_value_that_no_save_writes_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError):
        decode(value, {"here": torch.ones(2)})
