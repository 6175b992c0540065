"""`Profiler`: the tables, cProfile and torch's profiler."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from paceline.callbacks import Callback, LambdaCallback, Profiler
from paceline.errors import ConfigurationError

from helpers.ranks import run_ranks
from helpers.tiny import Regression, assert_same, loader, tiny_trainer

SECONDS = 0.01


class Slow(Regression):
    """Each phase takes a time of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(2 * SECONDS)
        return super().training_step(batch, batch_idx)

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        time.sleep(SECONDS)
        super().backward(loss)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(SECONDS)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(SECONDS)


class SlowHook(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(SECONDS / 2)


def test_phases_fill_the_time_and_hooks_are_inside(capsys: pytest.CaptureFixture[str]) -> None:
    profiler = Profiler()
    began = time.perf_counter()
    trainer = tiny_trainer(callbacks=[profiler, SlowHook()], max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(Slow(), loader(8), loader(4))
    took = time.perf_counter() - began
    phases = profiler.times.phases
    assert phases["forward"].calls == phases["backward"].calls == phases["optimizer step"].calls == 8
    assert 16 * SECONDS < phases["forward"].seconds < 22 * SECONDS
    assert 8 * SECONDS < phases["backward"].seconds < 14 * SECONDS
    assert phases["optimizer step"].seconds > 4 * SECONDS
    assert phases["validation step"].seconds > 4 * SECONDS
    assert phases["sanity check"].seconds > 2 * SECONDS
    assert took * 0.8 < sum(spent.seconds for spent in phases.values()) < took
    hook = profiler.times.hooks["SlowHook.on_train_batch_end"]
    assert (hook.calls, 4 * SECONDS < hook.seconds < phases["optimizer step"].seconds) == (8, True)
    printed = capsys.readouterr().out
    assert printed.count("Profile of fit:") == 1
    assert re.search(r"^forward +8 +0\.\d{4} +\d+\.\d{3} +\d+\.\d$", printed, re.MULTILINE)
    assert printed.index("phase  ") < printed.index("hook or block") < printed.index("SlowHook.on_train_batch_end")


def test_other_calls_have_tables_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    profiler = Profiler()
    trainer = tiny_trainer(callbacks=[profiler])
    trainer.test(Slow(), loader(4), verbose=False)
    assert profiler.times.phases["test step"].calls == 2
    trainer.predict(Slow(), loader(4))
    assert profiler.times.phases["predict step"].seconds > 2 * SECONDS
    assert "test step" not in profiler.times.phases
    assert re.findall("Profile of (.*):", capsys.readouterr().out) == ["test", "predict"]


def test_a_block_of_ones_own() -> None:
    profiler = Profiler()

    class Net(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with profiler.profile("the loss"):
                return super().training_step(batch, batch_idx)

    tiny_trainer(callbacks=[profiler]).fit(Net(), loader(8))
    assert profiler.times.hooks["the loss"].calls == 4


def test_the_tables_go_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_trainer(callbacks=[Profiler(dirpath=tmp_path / "profiles", filename="mine")]).fit(Slow(), loader(4))
    assert "forward" in (tmp_path / "profiles" / "fit-mine.txt").read_text()
    assert "forward" not in capsys.readouterr().out


def test_a_call_that_raises_tells_where_its_time_went(capsys: pytest.CaptureFixture[str]) -> None:
    class Raising(Slow):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                raise KeyError
            return super().training_step(batch, batch_idx)

    with pytest.raises(KeyError):
        tiny_trainer(callbacks=[Profiler("advanced")]).fit(Raising(), loader(8))
    assert "Profile of fit:" in capsys.readouterr().out
    tiny_trainer(callbacks=[Profiler("advanced")]).fit(Slow(), loader(4))  # cProfile was switched off


def test_pythons_profiler(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_trainer(callbacks=[Profiler("advanced", row_limit=50)]).fit(Slow(), loader(4))
    printed = capsys.readouterr().out
    assert "cumtime" in printed
    assert "training_step" in printed


def test_torchs_profiler_writes_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    profiler = Profiler("pytorch", dirpath="traces", wait=1, warmup=1, active=2, record_shapes=True)
    tiny_trainer(callbacks=[profiler]).fit(Slow(), loader(16))
    assert profiler.trace_paths == ["traces/fit-profile.pt.trace.json"]
    events = json.loads(Path(profiler.trace_paths[0]).read_text())["traceEvents"]
    spans = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    for name in ("forward", "backward", "optimizer step"):
        assert spans.count(name) == 2
    assert any(event.get("name") == "aten::linear" for event in events)
    printed = capsys.readouterr().out
    assert "Self CPU time total" in printed
    assert "aten::" in printed


def test_several_traces_and_none(capsys: pytest.CaptureFixture[str]) -> None:
    profiler = Profiler("pytorch", dirpath="traces", filename="p", wait=0, warmup=1, active=1, repeat=0)
    trainer = tiny_trainer(callbacks=[profiler])
    trainer.predict(Slow(), loader(8))
    assert profiler.trace_paths[:2] == ["traces/predict-p.pt.trace.json", "traces/predict-p-1.pt.trace.json"]
    assert all(Path(path).exists() for path in profiler.trace_paths)
    tiny_trainer(callbacks=[Profiler("pytorch", dirpath="none", wait=10)]).fit(Slow(), loader(4))
    assert "recorded no batch" in capsys.readouterr().out
    assert not Path("none").exists()


@pytest.mark.parametrize("kind", ["simple", "advanced", "pytorch"])
def test_nothing_of_the_run_is_another(kind: Any) -> None:
    measured, plain = Regression(), Regression()
    stops = LambdaCallback(on_train_batch_start=lambda t, m, b, i: -1 if i == 3 else None)
    tiny_trainer(callbacks=[Profiler(kind, dirpath="p"), stops], max_epochs=2).fit(measured, loader(12))
    tiny_trainer(callbacks=[stops], max_epochs=2).fit(plain, loader(12))
    assert_same(measured, plain)


def test_lightnings_spellings() -> None:
    assert Profiler.from_argument(None) is None
    mine = Profiler()
    assert Profiler.from_argument(mine) is mine
    for kind in ("simple", "advanced", "pytorch"):
        profiler = Profiler.from_argument(kind)
        assert profiler is not None
        assert profiler.kind == kind
    for value in ("xla", True, 3):
        with pytest.raises(ConfigurationError, match="simple, advanced, pytorch"):
            Profiler.from_argument(value)


def test_misuse_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="simple, advanced, pytorch"):
        Profiler("slow")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="record_shapes"):
        Profiler("simple", record_shapes=True)


def profiles_on_a_rank() -> Any:
    profiler = Profiler("pytorch", dirpath="traces")
    tiny_trainer(callbacks=[profiler], strategy="ddp", devices=2).fit(Slow(), loader(16))
    return profiler.trace_paths


def test_only_rank_zero_measures() -> None:
    results = run_ranks(profiles_on_a_rank, 2)
    assert [len(paths) for paths in results] == [1, 0]
    assert ["Profile of fit:" in output for output in results.outputs] == [True, False]
