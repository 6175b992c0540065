"""`ModelSummary` and `summarize`."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from paceline.callbacks import ModelSummary
from paceline.callbacks.model_summary import human_count, rich_table, summarize
from paceline.errors import ConfigurationError

from helpers.ranks import run_ranks
from helpers.tiny import Regression, loader, tiny_trainer, weights


class Deep(Regression):
    """A net of two levels, with a parameter of its own, dropout, and frozen layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.scale = nn.Parameter(torch.ones(2))
        self.layer.requires_grad_(False)
        self.example_input_array = torch.randn(5, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (self.layer(inputs) + self.body(inputs)).squeeze(-1) * self.scale[0]


def test_a_summary_counts_parameters_by_layer() -> None:
    module = Deep()
    module.body[2].eval()
    summary = summarize(module)
    assert summary.layer_names == ["layer", "body", "other params"]
    assert summary.layer_types == ["Linear", "Sequential", "n/a"]
    assert summary.param_nums == [4, 4 * 3 + 4 + 8 + 5, 2]
    assert (summary.trainable_parameters, summary.total_parameters) == (31, 35)
    assert summary.model_size == pytest.approx(35 * 4 / 1e6)
    assert (summary.modules_in_train_mode, summary.modules_in_eval_mode) == (5, 1)


def test_depth() -> None:
    assert summarize(Deep(), -1).layer_names[:3] == ["layer", "body", "body.0"]
    assert summarize(Deep(), 2).layer_names == [
        "layer",
        "body",
        "body.0",
        "body.1",
        "body.2",
        "body.3",
        "other params",
    ]
    for depth in (-2, 1.5, True, "all"):
        with pytest.raises(ConfigurationError, match="max_depth"):
            ModelSummary(depth)  # type: ignore[arg-type]


def test_the_example_shows_sizes_and_changes_nothing() -> None:
    module = Deep()
    module.body[1].eval()
    before, stream = module.state_dict(), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in before.items()}
    summary = summarize(module, 2)
    sizes = dict(zip(summary.layer_names, zip(summary.in_sizes, summary.out_sizes, strict=True), strict=True))
    assert sizes["layer"] == ([5, 3], [5, 1])
    assert sizes["body.3"] == ([5, 4], [5, 1])
    assert sizes["other params"] == ("?", "?")
    torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), stream)
    assert [m.training for m in (module, module.body, module.body[1])] == [True, True, False]


@pytest.mark.parametrize("example", [(torch.ones(2, 3), torch.ones(2)), {"x": torch.ones(2, 3), "y": torch.ones(2)}])
def test_examples_of_several_arguments(example: Any) -> None:
    class Two(Regression):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:  # type: ignore[override]
            return self.layer(x).squeeze(-1) + y

    module = Two()
    module.example_input_array = example
    assert summarize(module).out_sizes == [[2, 1]]


def test_a_shared_weight_counts_once_in_the_total() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    summary = summarize(module)
    assert summary.param_nums == [16, 16]
    assert summary.total_parameters == 16


def test_lazy_layers_are_not_counted_and_the_table_says_so() -> None:
    summary = summarize(nn.Sequential(nn.LazyLinear(2)))
    assert summary.total_parameters == 0
    assert "2         Params of lazy layers" in str(summary)


def test_a_module_without_parameters_or_layers() -> None:
    assert "0         Total params" in str(summarize(nn.Module()))


def test_the_table_as_text_and_by_rich() -> None:
    summary = summarize(Deep())
    text = str(summary)
    assert "1 | body         | Sequential | 29     | train | [5, 3]   | [5, 1]" in text
    assert "31        Trainable params\n4         Non-trainable params\n35        Total params\n" in text
    for width in (100, 50):
        console = Console(file=io.StringIO(), width=width, force_terminal=True)
        console.print(rich_table(summary))
        assert "Seq" in console.file.getvalue()  # type: ignore[attr-defined]


def test_counts_for_people() -> None:
    assert [human_count(n) for n in (0, 999, 1234, 12_345_678, 7 * 10**9, 10**12)] == [
        "0",
        "999",
        "1.2 K",
        "12.3 M",
        "7.0 B",
        "1.0 T",
    ]


def test_fit_prints_the_table_once_and_other_calls_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny_trainer(callbacks=[ModelSummary(max_depth=-1)])
    trainer.fit(Deep(), loader(8))
    assert capsys.readouterr().out.count("Total params") == 1
    tiny_trainer(callbacks=[ModelSummary(max_depth=0)]).fit(Deep(), loader(8))
    assert "Total params" not in capsys.readouterr().out


def test_the_weights_are_those_of_a_run_without_it() -> None:
    results = []
    for callbacks in ([], [ModelSummary(-1)]):
        torch.manual_seed(1)
        module = Deep()
        tiny_trainer(callbacks=callbacks).fit(module, loader(8, shuffle=True))
        results.append(weights(module))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def fits_on_a_rank() -> None:
    tiny_trainer(callbacks=[ModelSummary()], strategy="ddp", devices=2).fit(Deep(), loader(8))


def test_only_rank_zero_prints() -> None:
    outputs = run_ranks(fits_on_a_rank, 2).outputs
    assert ["Total params" in output for output in outputs] == [True, False]
