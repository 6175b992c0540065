"""Hyper-parameters: which are found, what a checkpoint holds of them, and how a module is made again from them."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import json
import pickle
import warnings
from argparse import Namespace
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any, Optional, Union

import numpy
import pytest
import torch
from torch import nn

from paceline.errors import ConfigurationError, UnknownArgumentError
from paceline.trainer.checkpoint.encode import decode, encode
from paceline.trainer.datamodule import DataModule
from paceline.trainer.hparams import AttributeDict, filter_init_arguments, hparams_for_checkpoint
from paceline.trainer.module import Module


class Parent(Module):
    def __init__(self, a, b=2, *rest, c=3, **kwargs):
        super().__init__()
        self.save_hyperparameters()


class Child(Parent):
    def __init__(self, x, a=7, **kwargs):
        super().__init__(a=a * 2, **kwargs)


class SavingChild(Parent):
    def __init__(self, x, a=7, **kwargs):
        super().__init__(a=a * 2, **kwargs)
        self.save_hyperparameters()


class Picking(Module):
    def __init__(self, lr, layers=2, *, name="x", **kwargs):
        super().__init__()
        self.save_hyperparameters("lr", "layers")


class WithConfig(Module):
    def __init__(self, conf, lr=1):
        super().__init__()
        self.conf, self.lr = conf, lr
        self.save_hyperparameters(conf)


class WithNet(Module):
    def __init__(self, net, width=3, ignore=None):
        super().__init__()
        self.net = net
        self.save_hyperparameters(ignore=ignore)


@dataclasses.dataclass
class Config:
    width: int = 4
    path: Path = Path("data")
    doubled: int = dataclasses.field(init=False, default=0)
    inner: Optional[Config] = None  # noqa: UP045 - both spellings must work

    def __post_init__(self):
        self.doubled = 2 * self.width


class Color(enum.Enum):
    RED = "red"


def stored(module):
    """What is read back from a checkpoint of `module`, through JSON."""
    value, tensors = encode(module._hparams_to_store())
    return decode(json.loads(json.dumps(value)), tensors)


def made_again(module, **overrides):
    kwargs = filter_init_arguments(
        type(module), stored(module), overrides, module._hparams_name, module._hparams_init_names
    )
    return type(module)(**kwargs)


# --- which arguments are kept ------------------------------------------------------------------------------------
def test_all_arguments_are_kept_with_defaults_and_keyword_arguments_one_by_one():
    assert Parent(1, 5, 6, 7, d=9).hparams == {"a": 1, "b": 5, "c": 3, "d": 9}


@pytest.mark.parametrize("kind", [Child, SavingChild])
def test_a_childs_arguments_are_kept_and_win_over_those_it_passes_up(kind):
    assert kind(1, a=5, z=3).hparams == {"x": 1, "a": 5, "b": 2, "c": 3, "z": 3}


def test_a_child_may_pick_names_after_its_parent_saved_all():
    class PickingChild(Parent):
        def __init__(self, x, **kwargs):
            super().__init__(a=0, **kwargs)
            self.save_hyperparameters("x")

    assert PickingChild(1).hparams == {"x": 1, "a": 0, "b": 2, "c": 3}


def test_a_child_may_ignore_what_its_parent_saved():
    class IgnoringChild(Parent):
        def __init__(self, x, **kwargs):
            super().__init__(**kwargs)
            self.save_hyperparameters(ignore="x")

    assert IgnoringChild(1, a=5).hparams == {"a": 5, "b": 2, "c": 3}


def test_three_generations_are_followed():
    class GrandChild(Child):
        def __init__(self, y=0, **kwargs):
            super().__init__(x=y + 1, **kwargs)

    assert GrandChild(y=4, b=8).hparams == {"y": 4, "x": 5, "a": 7, "b": 8, "c": 3}


def test_a_module_inside_another_keeps_only_its_own_arguments():
    class Outer(Module):
        def __init__(self, q, w=3):
            super().__init__()
            self.inner = Parent(2, b=9)
            self.save_hyperparameters()

    outer = Outer(1)
    assert outer.hparams == {"q": 1, "w": 3}
    assert outer.inner.hparams == {"a": 2, "b": 9, "c": 3}


def test_it_may_be_called_from_a_method_or_a_function_inside_init():
    class Helped(Module):
        def __init__(this, a=1):
            super().__init__()
            this.prepare(b=2)

        def prepare(self, b):
            (lambda c: self.save_hyperparameters())(3)

    assert Helped(5).hparams == {"a": 5}


def test_it_may_be_called_before_the_parents_init():
    class Early(Module):
        def __init__(self, a=1):
            self.save_hyperparameters()
            super().__init__()

    assert Early(5).hparams == {"a": 5}


def test_an_init_behind_a_decorator_is_found():
    def decorated(init):
        @functools.wraps(init)
        def wrapper(self, *args, **kwargs):
            return init(self, *args, **kwargs)

        return wrapper

    class Decorated(Module):
        @decorated
        def __init__(self, a, b=2):
            super().__init__()
            self.save_hyperparameters()

    assert Decorated(1).hparams == {"a": 1, "b": 2}
    assert made_again(Decorated(1)).hparams == {"a": 1, "b": 2}


def test_an_overridden_save_hyperparameters_and_a_given_frame_work():
    class Overriding(Module):
        def __init__(self, a=1):
            super().__init__()
            self.save_hyperparameters()

        def save_hyperparameters(self, *args, **kwargs):
            super().save_hyperparameters(*args, **kwargs)

    assert Overriding(4).hparams == {"a": 4}

    class Framed(Module):
        def __init__(self, a=1):
            import inspect

            super().__init__()
            self.save_hyperparameters(frame=inspect.currentframe())

    assert Framed(4).hparams == {"a": 4}


def test_values_are_those_of_the_moment():
    class Changing(Module):
        def __init__(self, lr=1):
            lr = lr * 10
            super().__init__()
            self.save_hyperparameters()
            lr = 0

    assert Changing(2).hparams == {"lr": 20}


def test_arguments_may_have_any_name():
    class Odd(Module):
        def __init__(self, args=1, kwargs=2, self_=3, frame=4):
            super().__init__()
            self.save_hyperparameters()

    assert Odd().hparams == {"args": 1, "kwargs": 2, "self_": 3, "frame": 4}


def test_a_data_module_keeps_its_arguments_too():
    class Data(DataModule):
        def __init__(self, batch_size=3, **kwargs):
            super().__init__()
            self.save_hyperparameters()

    assert Data(4, workers=2).hparams == {"batch_size": 4, "workers": 2}


def test_a_dataclass_module_keeps_its_fields():
    @dataclasses.dataclass(eq=False)
    class Base(Module):
        a: int
        b: list = dataclasses.field(default_factory=list)
        computed: int = dataclasses.field(default=3, init=False)

        def __post_init__(self):
            super().__init__()
            self.save_hyperparameters()

    @dataclasses.dataclass(eq=False)
    class Derived(Base):
        c: dict = dataclasses.field(default_factory=dict)

        def __post_init__(self):
            super().__post_init__()
            self.save_hyperparameters(ignore="a")

    assert Base(1).hparams == {"a": 1, "b": []}
    assert Derived(1, [2]).hparams == {"b": [2], "c": {}}
    assert made_again(Base(1, [5])).b == [5]


def test_saving_outside_of_init_warns_that_nothing_was_saved():
    module = Parent(1)
    with pytest.warns(UserWarning, match="no __init__ of Parent is running"):
        module.save_hyperparameters()
    assert module.hparams == {"a": 1, "b": 2, "c": 3}


# --- names, ignore, objects ----------------------------------------------------------------------------------------
def test_names_pick_arguments():
    assert Picking(0.1, 5).hparams == {"lr": 0.1, "layers": 5}


def test_names_pick_keyword_arguments_that_init_does_not_name():
    class PickingExtra(Module):
        def __init__(self, **kwargs):
            super().__init__()
            self.save_hyperparameters("extra")

    assert PickingExtra(extra=1, other=2).hparams == {"extra": 1}


def test_a_name_that_is_no_argument_is_refused_with_the_nearest():
    class Misspelt(Module):
        def __init__(self, layers=1):
            local = layers
            super().__init__()
            self.save_hyperparameters("layer" if local else "local")

    with pytest.raises(UnknownArgumentError, match="Did you mean 'layers'"):
        Misspelt(1)
    with pytest.raises(UnknownArgumentError, match="is no argument of Misspelt"):
        Misspelt(0)


@pytest.mark.parametrize("ignore", ["b", ["b"], ("b", "no such"), {"b"}])
def test_ignored_arguments_are_not_kept(ignore):
    class Ignoring(Module):
        def __init__(self, a=1, b=2):
            super().__init__()
            self.save_hyperparameters(ignore=ignore)

    assert Ignoring().hparams == {"a": 1}


@pytest.mark.parametrize(
    "config", [{"a": 1, "b": 2}, OrderedDict(a=1, b=2), Namespace(a=1, b=2), AttributeDict(a=1, b=2)]
)
def test_the_items_of_a_config_object_are_kept(config):
    module = WithConfig(config)
    assert module.hparams == {"a": 1, "b": 2}
    assert isinstance(module.hparams, AttributeDict)


def test_the_fields_of_a_dataclass_instance_are_kept():
    assert WithConfig(Config(3)).hparams == {"width": 3, "path": Path("data"), "doubled": 6, "inner": None}


def test_a_config_object_may_be_any_dict_and_come_with_names():
    class Both(Module):
        def __init__(self, conf, lr=1):
            super().__init__()
            self.save_hyperparameters({"q": 1, "z": 2}, "lr", ignore="z")

    assert Both(None).hparams == {"q": 1, "lr": 1}


def test_a_config_and_extra_keyword_arguments_are_joined():
    class Documented(Module):
        def __init__(self, conf=None, **kwargs):
            super().__init__()
            self.save_hyperparameters(conf)
            self.save_hyperparameters(kwargs)

    assert Documented({"a": 1}, z=3).hparams == {"a": 1, "z": 3}
    assert Documented().hparams == {}
    assert made_again(Documented({"a": 1}, z=3)).hparams == {"a": 1, "z": 3}
    assert made_again(Documented({"a": 1})).hparams == {"a": 1}


@pytest.mark.parametrize("value", [5, 0.1, [1, 2], object(), Config])
def test_an_object_without_names_is_refused_and_told_to_be_named(value):
    with pytest.raises(ConfigurationError, match=r'names of arguments, as in save_hyperparameters\("lr"\)'):
        WithConfig(value)


def test_an_nn_module_is_kept_with_one_warning_that_names_it():
    net = nn.Linear(1, 1)
    with pytest.warns(UserWarning, match=r"\['net'\] are nn.Modules.*ignore=\['net'\]") as told:
        module = WithNet(net)
    assert len(told) == 1
    assert module.hparams.net is net


def test_an_ignored_nn_module_is_not_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert WithNet(nn.Linear(1, 1), ignore="net").hparams == {"width": 3, "ignore": "net"}


def test_logger_says_whether_loggers_write_them():
    class Quiet(Module):
        def __init__(self, a=1):
            super().__init__()
            self.save_hyperparameters(logger=False)

    assert Parent(1)._log_hyperparams is True
    assert Quiet()._log_hyperparams is False
    assert Module()._log_hyperparams is False


# --- hparams ---------------------------------------------------------------------------------------------------------
def test_hparams_are_attributes_and_items_and_may_be_changed():
    hparams = Parent(1).hparams
    hparams.lr = 0.1
    hparams["a"] = 2
    assert hparams.a == 2
    assert hparams["lr"] == 0.1
    del hparams.lr
    assert "lr" not in hparams


def test_a_missing_hyper_parameter_is_an_attribute_error_that_lists_them():
    with pytest.raises(AttributeError, match="no attribute 'lr'; it holds a, b, c"):
        Parent(1).hparams.lr


def test_hparams_are_empty_before_any_is_saved():
    assert Module().hparams == {}
    assert Module().hparams_initial == {}


def test_hparams_cannot_be_replaced():
    with pytest.raises(AttributeError):
        Parent(1).hparams = {}


def test_hparams_print_as_a_table():
    assert repr(Parent(1, layers=[2]).hparams) == '"a":      1\n"b":      2\n"c":      3\n"layers": [2]'
    assert str(AttributeDict()) == ""


def test_hparams_initial_stays_as_it_was_saved():
    config = {"layers": [1], "net": nn.Linear(1, 1), "t": torch.ones(2), "c": Config(3)}
    module = Parent(config)
    module.hparams.b = 99
    config["layers"].append(2)
    config["t"].zero_()
    config["c"].width = 0
    initial = module.hparams_initial
    assert (initial.b, initial.a["layers"], initial.a["t"].tolist(), initial.a["c"]) == (2, [1], [1, 1], Config(3))
    assert initial.a["net"] is config["net"]
    initial.b = 5
    assert module.hparams_initial.b == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copied_module_has_hparams_of_its_own(copied):
    module = Parent(1)
    twin = copied(module)
    twin.hparams.a = 5
    assert isinstance(twin.hparams, AttributeDict)
    assert (module.hparams.a, twin.hparams.a, twin.hparams_initial.a) == (1, 5, 1)
    assert copy.copy(module.hparams) == module.hparams


# --- what a checkpoint holds -----------------------------------------------------------------------------------------
def test_plain_values_tensors_and_numpy_values_are_stored():
    values = {
        "none": None,
        "numbers": [1, 2.5, True, float("inf")],
        "tuple": (1, ("x", 2)),
        "dict": {"a": {1: 2}},
        "tensor": torch.ones(2),
        "parameter": nn.Parameter(torch.ones(2)),
        "array": numpy.arange(3),
        "scalar": numpy.float32(0.5),
        "double": numpy.float64(0.5),
    }
    storable, left_out = hparams_for_checkpoint(values)
    assert left_out == []
    assert list(storable) == list(values)
    back = decode(*encode(storable))
    assert back["numbers"] == values["numbers"]
    assert back["tuple"] == (1, ("x", 2))
    assert back["dict"] == {"a": {1: 2}}
    assert type(back["scalar"]) is numpy.float32
    assert type(back["double"]) is numpy.float64
    assert torch.equal(back["parameter"], torch.ones(2))


def test_what_has_an_equal_in_plain_types_is_stored_as_that():
    class Level(enum.IntEnum):
        HIGH = 3

    class Text(str):
        __slots__ = ()

    Point = namedtuple("Point", "x y")
    values = {
        "config": Config(3, inner=Config(1)),
        "namespace": Namespace(a=Path("x") / "y"),
        "enum": Color.RED,
        "int_enum": Level.HIGH,
        "text": Text("t"),
        "set": {"b", "a"},
        "size": torch.Size([2, 3]),
        "point": Point(1, 2),
        "device": torch.device("cpu"),
        "range": range(3),
        "ordered": OrderedDict(a=1),
    }
    storable, left_out = hparams_for_checkpoint(values)
    assert left_out == []
    assert storable == {
        "config": {
            "width": 3,
            "path": "data",
            "doubled": 6,
            "inner": {"width": 1, "path": "data", "doubled": 2, "inner": None},
        },
        "namespace": {"a": str(Path("x/y"))},
        "enum": "red",
        "int_enum": 3,
        "text": "t",
        "set": ["a", "b"],
        "size": (2, 3),
        "point": (1, 2),
        "device": "cpu",
        "range": [0, 1, 2],
        "ordered": {"a": 1},
    }
    assert encode(storable)


def test_what_cannot_be_stored_is_left_out_by_name():
    values = {
        "net": nn.Linear(1, 1),
        "function": len,
        "kind": nn.ReLU,
        "dtype": torch.float32,
        "lambda": lambda x: x,
        "bytes": b"x",
        "object": object(),
        "inside": {"a": [1, {"f": len}]},
        "keys": {object(): 1},
        "kept": 1,
    }
    storable, left_out = hparams_for_checkpoint(values)
    assert storable == {"kept": 1}
    assert left_out == [name for name in values if name != "kept"]


def test_what_is_left_out_stays_in_hparams_and_is_told_once():
    class Holding(Module):
        def __init__(self, activation, loss, width=1):
            super().__init__()
            self.save_hyperparameters()

    module = Holding(torch.relu, len)
    with pytest.warns(UserWarning, match=r"\['activation', 'loss'\] cannot be stored.*load_from_checkpoint") as told:
        assert module._hparams_to_store() == {"width": 1}
        assert module._hparams_to_store() == {"width": 1}
    assert len(told) == 1
    assert module.hparams.activation is torch.relu


# --- made again -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("module", [Parent(1, 5, d=9), Picking(0.1, 5)])
def test_a_module_is_made_again_with_its_hyper_parameters(module):
    assert made_again(module).hparams == module.hparams


def test_overrides_win_over_what_was_stored():
    assert made_again(Parent(1, 5), b=7, new=8).hparams == {"a": 1, "b": 7, "c": 3, "new": 8}


def test_changed_hyper_parameters_are_the_stored_ones():
    module = Picking(0.1)
    module.hparams.lr = 0.5
    assert made_again(module).hparams.lr == 0.5


def test_stored_hyper_parameters_that_init_does_not_take_are_dropped():
    module = Parent(1, b=3)

    class Other(Module):
        def __init__(self, b, z=1):
            super().__init__()

    assert filter_init_arguments(Other, stored(module), {}) == {"b": 3}


def test_arguments_that_a_class_computes_for_its_parent_are_computed_again():
    """The parent's `a` is among the hparams, but passing it on again would be "multiple values for argument 'a'"."""

    class Computing(Parent):
        def __init__(self, x, **kwargs):
            super().__init__(a=x * 2, **kwargs)

    module = Computing(4, b=6)
    assert module.hparams == {"x": 4, "a": 8, "b": 6, "c": 3}
    assert made_again(module, x=5).hparams == {"x": 5, "a": 10, "b": 6, "c": 3}


def test_missing_arguments_are_named_with_the_call_that_gives_them():
    class Needy(Module):
        def __init__(self, net, loss, lr=0.1):
            super().__init__()
            self.net = net
            self.save_hyperparameters("lr")

    module = Needy(nn.Linear(1, 1), len)
    with pytest.raises(
        ConfigurationError, match=r"Needy needs \['net', 'loss'\].*load_from_checkpoint\(path, net=\.\.\."
    ):
        made_again(module)
    net = nn.Linear(1, 1)
    assert made_again(module, net=net, loss=len).net is net


def test_an_override_that_is_no_argument_is_refused_with_the_nearest():
    class Strict(Module):
        def __init__(self, layers=1):
            super().__init__()
            self.save_hyperparameters()

    with pytest.raises(UnknownArgumentError, match=r"does not take\. Did you mean 'layers'"):
        made_again(Strict(), layer=3)


def test_a_class_without_an_init_of_its_own_gets_no_arguments():
    class Plain(Module):
        pass

    assert filter_init_arguments(Plain, {"q": 1}, {}) == {}
    assert filter_init_arguments(Plain, None, {}) == {}


def test_one_config_argument_gets_all_of_its_items_back():
    module = WithConfig({"a": 1, "lr": 5})
    again = made_again(module)
    assert again.conf == {"a": 1, "lr": 5}
    assert again.conf.a == 1
    assert again.lr == 1
    assert again.hparams == module.hparams


def test_overrides_reach_into_the_one_config_argument():
    again = made_again(WithConfig({"a": 1, "lr": 5}), a=7, lr=9, more=2)
    assert again.conf == {"a": 7, "lr": 9, "more": 2}
    assert again.lr == 9
    assert made_again(WithConfig({"a": 1}), conf={"z": 1}).conf == {"z": 1}
    with pytest.raises(UnknownArgumentError):
        made_again(WithConfig({"a": 1}), conf={"z": 1}, more=2)


def test_a_config_argument_and_picked_names_come_back_apart():
    class Both(Module):
        def __init__(self, conf, lr=1, width=2):
            super().__init__()
            self.conf, self.lr, self.width = conf, lr, width
            self.save_hyperparameters("lr")
            self.save_hyperparameters(conf)

    again = made_again(Both({"a": 1, "width": 8}, lr=3))
    assert (again.conf["a"], again.lr, again.width) == (1, 3, 2)


def test_a_config_that_a_child_passes_up_is_given_under_the_childs_name():
    class Renaming(WithConfig):
        def __init__(self, settings):
            super().__init__(settings, lr=3)

    again = made_again(Renaming({"a": 1}))
    assert again.conf == {"a": 1}
    assert again.lr == 3


def test_annotations_turn_plain_values_back_into_what_was_given():
    class Annotated(Module):
        def __init__(
            self,
            config: Config,
            color: Color | None,
            path: Union[Path, None],  # noqa: UP007 - both spellings must work
            names: set[str],
            device: torch.device,
            space: Namespace,
            plain: dict[str, int],
            unclear: UnknownToAll,  # noqa: F821 - cannot be evaluated, as what only type checkers import
            untold,
            anything: Any,
        ):
            super().__init__()
            self.save_hyperparameters()

    given = {
        "config": Config(3, inner=Config(1, Path("x"))),
        "color": Color.RED,
        "path": Path("a/b"),
        "names": {"x", "y"},
        "device": torch.device("cpu"),
        "space": Namespace(a=1),
        "plain": {"a": 1},
        "unclear": {"b": [2]},
        "untold": Config(2),
        "anything": 3,
    }
    again = made_again(Annotated(**given)).hparams
    for name in ("config", "color", "path", "names", "device", "space", "anything"):
        assert again[name] == given[name]
        assert type(again[name]) is type(given[name])
    assert type(again.plain) is dict
    assert again.unclear == {"b": [2]}
    assert again.untold.width == 2  # nobody said which dataclass: a dict whose items are attributes


def test_a_dataclass_config_comes_back_as_one():
    class Configured(Module):
        def __init__(self, config: Config):
            super().__init__()
            self.config = config
            self.save_hyperparameters(config)

    assert made_again(Configured(Config(3))).config == Config(3)
    assert made_again(Configured(Config(3)), width=9).config == Config(9)
    with pytest.raises(UnknownArgumentError, match="'widht'"):
        made_again(Configured(Config(3)), widht=9)


def test_a_config_that_a_child_makes_itself_is_made_again_by_it():
    class Making(WithConfig):
        def __init__(self, a=1, **kwargs):
            super().__init__({"a": a}, **kwargs)

    assert made_again(Making(5)).conf == {"a": 5}
    assert made_again(Making(5), a=6).conf == {"a": 6}


def test_the_same_config_saved_by_parent_and_child_comes_back():
    class Twice(WithConfig):
        def __init__(self, conf):
            super().__init__(conf)
            self.save_hyperparameters(conf)
            self.save_hyperparameters({"extra": 1})

    assert made_again(Twice({"a": 1})).hparams == {"a": 1, "extra": 1}
