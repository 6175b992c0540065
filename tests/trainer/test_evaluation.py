"""validate, test and predict, and validation inside `fit`: every sample once, whatever the number of ranks.

Lengths are chosen so that nothing divides them; the numbers of one process are what several ranks must arrive at.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, WeightedRandomSampler

import paceline as pl
from paceline.errors import ConfigurationError

from helpers.ranks import run_ranks
from helpers.tiny import Numbers, Regression, Sums, loader, numbers, samples, tiny_trainer


class Sees(Sums):
    """Keeps (loader, batch_idx, samples) of all it evaluates and logs what can be logged."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, int, list[int]]] = []

    def see(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Tensor:
        values = torch.as_tensor(batch).reshape(-1)
        self.batches.append((dataloader_idx, batch_idx, values.tolist()))
        return values.float()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        values = self.see(batch, batch_idx, dataloader_idx)
        self.log("mean", values.mean())
        self.log("sum", values.sum(), reduce_fx="sum")
        self.log("min", values.min(), reduce_fx="min")
        self.log("max", values.max(), reduce_fx="max")
        self.log("host", float(values.mean()))
        self.log("both", values.mean(), on_step=True, on_epoch=True)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.see(batch, batch_idx, dataloader_idx) * 10 + dataloader_idx


class Countdown(IterableDataset[int]):
    """`count - 1` down to 0; without a length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return iter(range(self.count - 1, -1, -1))


def make_data(kind: str, count: int) -> Any:
    kinds: dict[str, Any] = {
        "in order": lambda: numbers(count, batch_size=3),
        "shuffled": lambda: numbers(count, batch_size=3, shuffle=True),
        "drop_last": lambda: numbers(count, batch_size=3, drop_last=True),
        "weighted": lambda: numbers(
            count, batch_size=3, sampler=WeightedRandomSampler([1.0] * count, count, replacement=False)
        ),
        "batch sampler": lambda: DataLoader(
            Numbers(count), batch_sampler=BatchSampler(SequentialSampler(range(count)), 3, drop_last=False)
        ),
        "no batches": lambda: numbers(count, batch_size=None),
        "iterable": lambda: DataLoader(Countdown(count), batch_size=3),
        "list": lambda: [torch.arange(i, min(i + 3, count)) for i in range(0, count, 3)],
        "two loaders": lambda: [numbers(count, batch_size=3), numbers(2, batch_size=1)],
        "workers": lambda: numbers(count, batch_size=3, num_workers=2),
    }
    return kinds[kind]()


KINDS = (
    "in order",
    "shuffled",
    "drop_last",
    "weighted",
    "batch sampler",
    "no batches",
    "iterable",
    "list",
    "two loaders",
)


def evaluate_all(counts: tuple[int, ...], strategy: str = "ddp") -> Any:
    """For each kind of data and length: (batches seen by this rank, results of validate, what predict returns)."""
    found = {}
    for kind in KINDS:
        for count in counts:
            trainer, module = tiny_trainer(strategy=strategy), Sees()
            results = trainer.validate(module, make_data(kind, count), verbose=False)
            seen, module.batches = module.batches, []
            predicted = trainer.predict(module, make_data(kind, count))
            assert module.batches == seen
            found[kind, count] = seen, results, predicted
    return found


COUNTS = (1, 2, 7, 11)


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_see_each_sample_once_and_find_the_numbers_of_one_process(ranks: int) -> None:
    alone = evaluate_all(COUNTS, "single")
    together = run_ranks(evaluate_all, ranks, COUNTS)
    for key, (seen, results, predicted) in alone.items():
        dealt = [rank[key][0] for rank in together]
        assert sorted(batch for share in dealt for batch in share) == sorted(seen), key
        for number, share in enumerate(dealt):
            assert all(batch_idx % ranks == number for _, batch_idx, _ in share), key
        for rank in together:
            assert len(rank[key][1]) == len(results)
            for mine, theirs in zip(rank[key][1], results, strict=True):
                assert {k: v for k, v in mine.items() if "step" not in k} == pytest.approx(theirs, abs=1e-6), key
            torch.testing.assert_close(rank[key][2], predicted, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_sees_each_sample_once_in_the_loaders_order(kind: str) -> None:
    (seen, results, predicted) = evaluate_all((7,), "single")[kind, 7]
    first = [value for index, _, values in seen for value in values if index == 0]
    if kind == "drop_last":
        assert first == [0, 1, 2, 3, 4, 5]
    elif kind in ("shuffled", "weighted"):
        assert sorted(first) == list(range(7))
        assert first != list(range(7))
    elif kind == "iterable":
        assert first == list(range(6, -1, -1))
    else:
        assert first == list(range(7))
    if kind == "two loaders":
        assert [value for index, _, values in seen for value in values if index == 1] == [0, 1]
        assert len(results) == len(predicted) == 2
        assert torch.equal(torch.cat(predicted[1]), torch.tensor([1.0, 11.0]))
    else:
        suffix = ""
        assert results[0][f"sum{suffix}"] == sum(first)
        assert results[0]["mean"] == results[0]["host"] == pytest.approx(sum(first) / len(first))
        assert torch.equal(torch.cat(predicted), torch.tensor(first) * 10.0)


def test_workers_see_each_sample_once_too() -> None:
    module = Sees()
    tiny_trainer().validate(module, make_data("workers", 11), verbose=False)
    assert [values for _, _, values in module.batches] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]


def test_batch_idx_counts_the_batches_of_all_ranks() -> None:
    module = Sees()
    tiny_trainer().test(module, [numbers(5), numbers(3)], verbose=False)
    assert [(index, batch_idx) for index, batch_idx, _ in module.batches] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


# --- what predict returns -------------------------------------------------------------------------------------------
def predict_objects() -> Any:
    class Objects(Sums):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return {"ids": batch.tolist(), "rank": self.global_rank, "text": f"batch {batch_idx}"}

    trainer = tiny_trainer(strategy="ddp")
    return trainer.predict(Objects(), numbers(5)), trainer.predict(Objects(), numbers(5), return_predictions=False)


def test_predict_gathers_whatever_predict_step_returns_in_the_order_of_batches_on_every_rank() -> None:
    expected = [
        {"ids": [0, 1], "rank": 0, "text": "batch 0"},
        {"ids": [2, 3], "rank": 1, "text": "batch 1"},
        {"ids": [4], "rank": 0, "text": "batch 2"},
    ]
    assert run_ranks(predict_objects, 2) == [(expected, None)] * 2


def test_predict_step_is_forward_where_none_is_defined() -> None:
    class Plain(Regression):
        def forward(self, batch: Any) -> Tensor:
            return super().forward(batch[0])

    outputs = tiny_trainer().predict(Plain(), loader(5))
    assert torch.equal(torch.cat(outputs), Plain()(samples(5).tensors))
    assert not outputs[0].requires_grad


# --- limits ---------------------------------------------------------------------------------------------------------
def limited(stage: str, limit: Any, count: int = 11) -> Any:
    trainer, module = tiny_trainer(strategy="ddp", **{f"limit_{stage}_batches": limit}), Sees()
    run = {"val": trainer.validate, "test": trainer.test, "predict": trainer.predict}[stage]
    run(module, numbers(count))
    return [batch_idx for _, batch_idx, _ in module.batches], getattr(trainer, f"num_{stage}_batches")


@pytest.mark.parametrize("stage", ["val", "test", "predict"])
@pytest.mark.parametrize(("limit", "kept"), [(4, 4), (100, 6), (0.5, 3), (1.0, 6), (0, 0), (0.0, 0)])
def test_a_limit_counts_the_batches_of_all_ranks(stage: str, limit: Any, kept: int) -> None:
    seen, counted = limited_alone(stage, limit)
    assert seen == list(range(kept))
    assert counted == [kept]


def limited_alone(stage: str, limit: Any) -> Any:
    trainer, module = tiny_trainer(**{f"limit_{stage}_batches": limit}), Sees()
    run = {"val": trainer.validate, "test": trainer.test, "predict": trainer.predict}[stage]
    run(module, numbers(11))
    return [batch_idx for _, batch_idx, _ in module.batches], getattr(trainer, f"num_{stage}_batches")


def test_a_limit_is_dealt_to_the_ranks() -> None:
    assert run_ranks(limited, 2, "val", 3) == [([0, 2], [3]), ([1], [3])]


def test_an_iterable_is_limited_by_a_number_but_not_by_a_fraction() -> None:
    module = Sees()
    tiny_trainer(limit_val_batches=2).validate(module, make_data("iterable", 11), verbose=False)
    assert len(module.batches) == 2
    with pytest.raises(ConfigurationError, match=r"limit_val_batches=0.5 is a fraction, but the loader has no length"):
        tiny_trainer(limit_val_batches=0.5).validate(module, make_data("iterable", 11), verbose=False)


# --- inside fit -----------------------------------------------------------------------------------------------------
class Notes(Sees):
    """When validation ran: the number of batches that were trained before it."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = 0
        self.validated: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trained += 1
        return super().training_step(batch, batch_idx)

    def on_validation_start(self) -> None:
        self.validated.append(self.trained)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [10, 20, 30]),
        ({"check_val_every_n_epoch": 2}, [20]),
        ({"val_check_interval": 0.5}, [5, 10, 15, 20, 25, 30]),
        ({"val_check_interval": 0.3}, [3, 6, 9, 13, 16, 19, 23, 26, 29]),
        ({"val_check_interval": 4}, [4, 8, 14, 18, 24, 28]),
        ({"val_check_interval": 10}, [10, 20, 30]),
        ({"val_check_interval": 1.0}, [10, 20, 30]),
        ({"val_check_interval": 1}, list(range(1, 31))),
        ({"val_check_interval": 0.5, "check_val_every_n_epoch": 3}, [25, 30]),
        ({"val_check_interval": 12, "check_val_every_n_epoch": None}, [12, 24]),
        ({"limit_val_batches": 0}, []),
        ({"limit_train_batches": 4}, [4, 8, 12]),
        ({"limit_train_batches": 0.5, "val_check_interval": 0.5}, [2, 4, 7, 9, 12, 14]),
    ],
)
def test_validation_runs_when_its_interval_says(arguments: dict[str, Any], expected: list[int]) -> None:
    module = Notes()
    trainer = tiny_trainer(max_epochs=3, num_sanity_val_steps=0, **arguments)
    trainer.fit(module, numbers(20), numbers(3))
    assert module.validated == expected


def test_what_falls_due_inside_a_window_happens_at_its_end() -> None:
    module = Notes()
    trainer = tiny_trainer(num_sanity_val_steps=0, accumulate_grad_batches=4, val_check_interval=3)
    trainer.fit(module, numbers(20), numbers(3))  # windows end after 4, 8 and 10 batches
    assert module.validated == [4, 8, 10]


def test_an_interval_that_never_comes_in_an_epoch_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"val_check_interval=11 is more than the 10 micro-batches"):
        tiny_trainer(val_check_interval=11).fit(Notes(), numbers(20), numbers(3))


@pytest.mark.parametrize("limit", [None, 100])
def test_a_loader_without_length_is_validated_at_the_end_of_its_epoch(limit: int | None) -> None:
    module = Notes()
    trainer = tiny_trainer(max_epochs=2, num_sanity_val_steps=0, limit_train_batches=limit)
    trainer.fit(module, make_data("iterable", 11), numbers(3))
    assert module.validated == [4, 8]


def test_a_loader_that_ends_before_its_length_is_validated_at_its_end() -> None:
    class Short(list[Tensor]):
        def __len__(self) -> int:
            return 10

    module = Notes()
    trainer = tiny_trainer(max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(module, Short([torch.arange(2)] * 7), numbers(3))
    assert module.validated == [7, 14]


def test_a_fraction_of_a_loader_without_length_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"val_check_interval=0\.5 is a fraction, but the training loader has no"
    ):
        tiny_trainer(val_check_interval=0.5).fit(Notes(), make_data("iterable", 11), numbers(3))


def test_fit_does_not_validate_without_a_validation_step_or_loader() -> None:
    trainer = tiny_trainer()
    trainer.fit(Sums(), numbers(4), numbers(4))
    assert not trainer.enable_validation
    trainer.fit(Notes(), numbers(4))
    assert not trainer.enable_validation


@pytest.mark.parametrize(("steps", "expected"), [(0, []), (1, [0]), (2, [0, 1]), (-1, [0, 1, 2]), (50, [0, 1, 2])])
def test_the_sanity_check_runs_so_many_batches_of_each_loader(steps: int, expected: list[int]) -> None:
    module = Notes()
    trainer = tiny_trainer(num_sanity_val_steps=steps, max_steps=0)

    class Counts(pl.Callback):
        def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
            self.counted = trainer.num_sanity_val_batches

    trainer = tiny_trainer(num_sanity_val_steps=steps, limit_train_batches=0, callbacks=Counts())
    trainer.fit(module, numbers(2), [numbers(6), numbers(6)])
    assert [batch_idx for index, batch_idx, _ in module.batches if index == 0] == expected
    assert [batch_idx for index, batch_idx, _ in module.batches if index == 1] == expected
    if expected:
        assert trainer.callbacks[0].counted == [len(expected)] * 2


def test_the_sanity_check_puts_the_random_state_back() -> None:
    class Draws(Notes):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            torch.rand(3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.drawn = torch.rand(())
            return super().training_step(batch, batch_idx)

    drawn = []
    for steps in (0, 2):
        torch.manual_seed(3)
        module = Draws()
        tiny_trainer(num_sanity_val_steps=steps, limit_val_batches=2).fit(module, numbers(2), numbers(6))
        drawn.append(float(module.drawn))
    assert drawn[0] == drawn[1]


def test_validation_goes_through_the_same_order_every_time() -> None:
    module = Notes()
    trainer = tiny_trainer(max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(module, numbers(4), numbers(7, batch_size=2, shuffle=True))
    assert len(module.batches) == 8
    assert module.batches[:4] == module.batches[4:]


# --- hooks around batches -------------------------------------------------------------------------------------------
def test_on_validation_batch_end_gets_what_validation_step_returned() -> None:
    class Returns(Sums):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return {"batch": batch, "number": batch_idx}

    class Keeps(pl.Callback):
        def __init__(self) -> None:
            self.kept: list[Any] = []

        def on_validation_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            self.kept.append((outputs["number"], outputs["batch"] is batch, batch_idx, dataloader_idx))

    keeps = Keeps()
    tiny_trainer(callbacks=keeps).validate(Returns(), [numbers(4), numbers(2)])
    assert keeps.kept == [(0, True, 0, 0), (1, True, 1, 0), (0, True, 0, 1)]


class NoIndices(Sums):
    def validation_step(self, batch: Any) -> None:
        self.log("mean", batch.float().mean())


class OnlyBatchIdx(Sums):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("mean", batch.float().mean())


class ByKeyword(Sums):
    def validation_step(self, batch: Any, *, dataloader_idx: int, batch_idx: int = 5) -> None:
        assert (dataloader_idx, batch_idx) in ((0, 0), (1, 0), (0, 1), (1, 1))
        self.log("mean", batch.float().mean())


@pytest.mark.parametrize("kind", [NoIndices, OnlyBatchIdx, ByKeyword, Sees])
def test_batch_idx_and_dataloader_idx_may_be_left_out_of_a_step(kind: type[pl.Module]) -> None:
    results = tiny_trainer().validate(kind(), [numbers(3), numbers(4)], verbose=False)
    assert [result[f"mean/dataloader_idx_{i}"] for i, result in enumerate(results)] == [1.0, 1.5]


# --- calls that cannot be meant -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("call", "step"), [("validate", "validation_step"), ("test", "test_step")])
def test_evaluating_a_module_without_the_step_says_which_to_define(call: str, step: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"Sums has no {step}, so {call}\(\).*Define {step}\(self, batch"):
        getattr(tiny_trainer(), call)(Sums(), numbers(2))


@pytest.mark.parametrize(("call", "hook"), [("validate", "val"), ("test", "test"), ("predict", "predict")])
def test_evaluating_without_data_says_where_it_may_come_from(call: str, hook: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"There is no {hook} data: pass a loader to {call}\(\), or define"):
        getattr(tiny_trainer(), call)(Sees())


def test_evaluating_without_a_model_needs_one_from_a_call_before() -> None:
    with pytest.raises(ConfigurationError, match=r"validate\(\) was called without a model"):
        tiny_trainer().validate(dataloaders=numbers(2))


def test_a_loader_that_cannot_be_iterated_is_named() -> None:
    with pytest.raises(ConfigurationError, match="An evaluation loader is a int, which cannot be iterated"):
        tiny_trainer().validate(Sees(), 3)


def test_a_plain_torch_module_is_told_what_to_derive_from() -> None:
    with pytest.raises(ConfigurationError, match=r"expected a subclass of paceline\.Module"):
        tiny_trainer().validate(torch.nn.Linear(1, 1), numbers(2))


def test_results_are_printed_unless_verbose_is_false(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny_trainer()
    trainer.validate(OnlyBatchIdx(), numbers(4))
    assert "validate: mean 1.5" in capsys.readouterr().out
    trainer.validate(OnlyBatchIdx(), numbers(4), verbose=False)
    assert capsys.readouterr().out == ""


def test_a_loader_with_no_batch_gives_a_warning_and_no_metrics() -> None:
    with pytest.warns(UserWarning, match="has no batch: nothing of it is evaluated"):
        assert tiny_trainer().validate(Sees(), numbers(0), verbose=False) == []
    assert tiny_trainer().predict(Sees(), numbers(0)) == []
