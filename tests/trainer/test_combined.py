"""`CombinedLoader`: the four modes, on collections of any shape."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from itertools import zip_longest

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from paceline.errors import ConfigurationError
from paceline.trainer.combined import CombinedLoader

MODES = ["min_size", "max_size_cycle", "max_size", "sequential"]
PARALLEL_MODES = MODES[:3]


class Lengthless:
    """`name0`, `name1`, ...: an iterable that counts how often it is started and how much is drawn from it."""

    def __init__(self, name: str, length: int) -> None:
        self.batches = [f"{name}{number}" for number in range(length)]
        self.starts = self.drawn = 0

    def __iter__(self):
        self.starts += 1
        for batch in self.batches:
            self.drawn += 1
            yield batch


class Loader(Lengthless):
    def __len__(self):
        return len(self.batches)


def abc():
    return {"a": Loader("a", 2), "b": [Loader("b", 4), Loader("c", 3)]}


def batches(combined):
    return [batch for batch, _, _ in combined]


# --- the modes -------------------------------------------------------------------------------------------------


def test_min_size_ends_with_the_shortest_loader():
    assert list(CombinedLoader(abc())) == [
        ({"a": "a0", "b": ["b0", "c0"]}, 0, 0),
        ({"a": "a1", "b": ["b1", "c1"]}, 1, 0),
    ]


def test_max_size_fills_ended_loaders_with_none():
    assert list(CombinedLoader(abc(), "max_size")) == [
        ({"a": "a0", "b": ["b0", "c0"]}, 0, 0),
        ({"a": "a1", "b": ["b1", "c1"]}, 1, 0),
        ({"a": None, "b": ["b2", "c2"]}, 2, 0),
        ({"a": None, "b": ["b3", None]}, 3, 0),
    ]


def test_max_size_cycle_starts_short_loaders_again():
    loaders = abc()
    assert list(CombinedLoader(loaders, "max_size_cycle")) == [
        ({"a": "a0", "b": ["b0", "c0"]}, 0, 0),
        ({"a": "a1", "b": ["b1", "c1"]}, 1, 0),
        ({"a": "a0", "b": ["b2", "c2"]}, 2, 0),
        ({"a": "a1", "b": ["b3", "c0"]}, 3, 0),
    ]
    assert [loader.starts for loader in (loaders["a"], *loaders["b"])] == [2, 1, 2]


def test_sequential_gives_one_loader_after_another():
    assert list(CombinedLoader(abc(), "sequential")) == [
        ("a0", 0, 0),
        ("a1", 1, 0),
        ("b0", 0, 1),
        ("b1", 1, 1),
        ("b2", 2, 1),
        ("b3", 3, 1),
        ("c0", 0, 2),
        ("c1", 1, 2),
        ("c2", 2, 2),
    ]


def test_sequential_starts_a_loader_only_when_its_turn_comes():
    first, second = Loader("a", 2), Loader("b", 2)
    running = iter(CombinedLoader([first, second], "sequential"))
    next(running), next(running)
    assert (first.starts, second.starts) == (1, 0)


SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@given(SIZES)
def test_modes_agree_with_what_itertools_would_give(sizes):
    columns = [[f"{name}{number}" for number in range(size)] for name, size in enumerate(sizes)]
    loaders = [Loader(str(name), size) for name, size in enumerate(sizes)]
    longest = range(max(sizes))
    assert batches(CombinedLoader(loaders)) == [list(row) for row in zip(*columns, strict=False)]
    assert batches(CombinedLoader(loaders, "max_size")) == [list(row) for row in zip_longest(*columns)]
    cycled = [[column[row % len(column)] for column in columns] for row in longest]
    assert batches(CombinedLoader(loaders, "max_size_cycle")) == cycled
    assert batches(CombinedLoader(loaders, "sequential")) == [batch for column in columns for batch in column]


@given(SIZES, st.sampled_from(MODES), st.data())
def test_the_length_is_the_number_of_batches_with_and_without_limits(sizes, mode, data):
    combined = CombinedLoader([Loader(str(name), size) for name, size in enumerate(sizes)], mode)
    assert len(combined) == len(list(combined))
    limit = st.integers(0, 7) | st.just(float("inf"))
    combined.limits = data.draw(st.none() | limit | st.lists(limit, min_size=len(sizes), max_size=len(sizes)))
    assert len(combined) == len(list(combined))


@given(SIZES, st.sampled_from(PARALLEL_MODES), st.data())
def test_limits_shorten_a_parallel_mode_and_change_no_batch(sizes, mode, data):
    combined = CombinedLoader([Loader(str(name), size) for name, size in enumerate(sizes)], mode)
    whole = list(combined)
    combined.limits = data.draw(st.lists(st.integers(0, 7), min_size=len(sizes), max_size=len(sizes)))
    limited = list(combined)
    assert limited == whole[: len(limited)]


@pytest.mark.parametrize("mode", MODES)
def test_loaders_without_a_length_run_to_their_end(mode):
    sized = CombinedLoader([Loader("a", 2), Loader("b", 4)], mode)
    lengthless = CombinedLoader([Lengthless("a", 2), Lengthless("b", 4)], mode)
    assert list(lengthless) == list(sized)


@pytest.mark.parametrize("mode", MODES)
def test_a_loader_may_give_none(mode):
    assert list(CombinedLoader(Nones(), mode)) == [(None, 0, 0), (None, 1, 0)]


class Nones:
    def __iter__(self):
        return iter([None, None])


def test_an_empty_loader_cannot_be_cycled():
    with pytest.raises(ConfigurationError, match="gives no batch"):
        list(CombinedLoader([Loader("a", 0), Loader("b", 2)], "max_size_cycle"))
    with pytest.raises(ConfigurationError, match="iterated only once"):
        list(CombinedLoader([iter(["a0"]), Loader("b", 2)], "max_size_cycle"))
    assert list(CombinedLoader([Loader("a", 0), Loader("b", 0)], "max_size_cycle")) == []


def test_an_empty_loader_ends_min_size_and_counts_for_nothing_elsewhere():
    loaders = [Loader("a", 0), Loader("b", 1)]
    assert list(CombinedLoader(loaders, "min_size")) == []
    assert list(CombinedLoader(loaders, "max_size")) == [([None, "b0"], 0, 0)]
    assert list(CombinedLoader(loaders, "sequential")) == [("b0", 0, 1)]


@pytest.mark.parametrize("empty", [[], {}, ()], ids=repr)
@pytest.mark.parametrize("mode", MODES)
def test_an_empty_collection_gives_nothing(mode, empty):
    combined = CombinedLoader(empty, mode)
    assert list(combined) == [] and len(combined) == 0 and combined.flattened == []


# --- collections -----------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("collection", "batch"),
    [
        (Loader("a", 1), "a0"),
        ([Loader("a", 1)], ["a0"]),
        ((Loader("a", 1), [Loader("b", 1)]), ("a0", ["b0"])),
        (Pair(Loader("a", 1), {"z": Loader("b", 1)}), Pair("a0", {"z": "b0"})),
        (OrderedDict(b=Loader("b", 1), a=Loader("a", 1)), OrderedDict(b="b0", a="a0")),
        (defaultdict(list, {"a": Loader("a", 1)}), defaultdict(list, {"a": "a0"})),
        (deque([Loader("a", 1)]), deque(["a0"])),
    ],
    ids=["one", "list", "tuple", "named tuple", "OrderedDict", "defaultdict", "deque"],
)
def test_a_batch_has_the_structure_of_the_collection(collection, batch):
    (given_back,) = batches(CombinedLoader(collection))
    assert given_back == batch and type(given_back) is type(batch)


def test_batches_do_not_share_their_structure():
    first, second = batches(CombinedLoader({"a": [Loader("a", 2)]}))
    assert (first, second) == ({"a": ["a0"]}, {"a": ["a1"]})


def test_data_loaders_work_as_leaves():
    combined = CombinedLoader({"a": DataLoader(range(4), batch_size=2), "b": DataLoader(range(3))}, "max_size_cycle")
    assert len(combined) == 3
    assert [(batch["a"].tolist(), batch["b"].tolist()) for batch in batches(combined)] == [
        ([0, 1], [0]),
        ([2, 3], [1]),
        ([0, 1], [2]),
    ]


def test_map_replaces_the_loaders_and_keeps_the_rest():
    combined = CombinedLoader({"a": [Loader("a", 3)], "b": Loader("b", 3)}, "max_size")
    combined.limits = [1, 2]
    mapped = combined.map(Renamed)
    assert (mapped.mode, mapped.limits) == ("max_size", [1, 2])
    assert [type(loader) for loader in mapped.flattened] == [Renamed, Renamed]
    assert batches(mapped) == [{"a": ["A0"], "b": "B0"}, {"a": ["A1"], "b": "B1"}]
    assert combined.iterables["b"] is combined.flattened[1] and type(combined.flattened[1]) is Loader


class Renamed:
    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return (batch.upper() for batch in self.loader)


# --- lengths and limits ----------------------------------------------------------------------------------------


def test_lengths_of_the_modes():
    lengths = {mode: len(CombinedLoader(abc(), mode)) for mode in MODES}
    assert lengths == {"min_size": 2, "max_size_cycle": 4, "max_size": 4, "sequential": 9}


class Endless(IterableDataset):
    def __iter__(self):
        return iter(int, 1)


class RefusesLen(Lengthless):
    def __len__(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    "without",
    [Lengthless("b", 3), RefusesLen("b", 3), DataLoader(Endless())],
    ids=["no __len__", "__len__ raises", "iterable data set"],
)
def test_a_missing_length_is_a_type_error_where_it_decides(without):
    loaders = {"a": Loader("a", 2), "b": without}
    assert len(CombinedLoader(loaders, "min_size")) == 2
    for mode in ("max_size_cycle", "max_size", "sequential"):
        combined = CombinedLoader(loaders, mode)
        with pytest.raises(TypeError, match=r"because iterables\['b'\] has none"):
            len(combined)
        combined.limits = 5
        assert len(combined) == (7 if mode == "sequential" else 5)


def test_one_limit_stands_for_all_loaders():
    combined = CombinedLoader(abc(), "sequential")
    assert combined.limits is None
    combined.limits = 1
    assert combined.limits == [1, 1, 1]
    assert list(combined) == [("a0", 0, 0), ("b0", 0, 1), ("c0", 0, 2)]
    combined.limits = None
    assert len(combined) == 9


def test_limits_of_another_number_are_refused():
    with pytest.raises(ConfigurationError, match=r"limits=\[1, 2\] are 2 for 3 loaders"):
        CombinedLoader(abc()).limits = [1, 2]


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_drawn_beyond_a_limit(mode):
    loaders = [Loader("a", 9), Loader("b", 9)]
    combined = CombinedLoader(loaders, mode)
    combined.limits = 2
    list(combined)
    assert [loader.drawn for loader in loaders] == [2, 2]


# --- iterating -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_each_iteration_starts_anew_and_two_do_not_disturb_each_other(mode):
    combined = CombinedLoader(abc(), mode)
    expected = list(combined)
    assert list(combined) == expected
    outer, inner = iter(combined), iter(combined)
    assert [pair[0] for pair in zip(outer, inner, strict=True)] == expected


def test_next_goes_on_with_the_newest_iteration():
    combined = CombinedLoader([Loader("a", 2)])
    with pytest.raises(RuntimeError, match=r"call iter\(combined_loader\) first"):
        next(combined)
    iter(combined)
    assert [next(combined)[0], next(combined)[0]] == [["a0"], ["a1"]]
    with pytest.raises(StopIteration):
        next(combined)


def test_iterators_are_let_go_without_a_garbage_collection():
    class Iterator:
        def __iter__(self):
            return self

        def __next__(self):
            return 0

    class Source:
        def __iter__(self):
            iterator = Iterator()
            made.append(weakref.ref(iterator))
            return iterator

    made: list[weakref.ref] = []
    gc.disable()
    try:
        for mode in MODES:
            combined = CombinedLoader([Source()], mode)
            for _ in combined:
                break
            combined.reset()
            assert made.pop()() is None, "reset() keeps the loader's iterator"
            next(iter(combined))
            del combined
            assert made.pop()() is None, "a CombinedLoader that is gone keeps its loader's iterator"
    finally:
        gc.enable()


def test_reset_ends_the_iteration():
    combined = CombinedLoader([Loader("a", 2)])
    combined.reset()
    running = iter(combined)
    next(running)
    combined.reset()
    assert list(running) == []
    with pytest.raises(RuntimeError):
        next(combined)


# --- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "nearest"), [("max", "max_size"), ("min-size", "min_size"), ("sequence", "sequential")]
)
def test_an_unknown_mode_is_refused_with_the_nearest(mode, nearest):
    with pytest.raises(ConfigurationError, match=rf"no mode='{mode}'\. Did you mean '{nearest}'"):
        CombinedLoader([], mode)


def test_what_cannot_be_iterated_is_refused_with_its_place():
    with pytest.raises(ConfigurationError, match=r"cannot iterate over iterables\['a'\]\[1\], which is 3"):
        CombinedLoader({"a": [Loader("a", 1), 3]})
    with pytest.raises(ConfigurationError, match=r"cannot iterate over iterables, which is None"):
        CombinedLoader(None)
