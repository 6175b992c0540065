"""DDP, FSDP and HSDP on two GPUs through NCCL: `python tests/gpu/two_gpus.py`, about six minutes, prints a table.

Every line of the table is a check with its number: weights like those of one process, bf16, clipping, resume to the
bit, a checkpoint moved between all strategies, a model built on the meta device, and memory and time a step beside
hand-written loops on `fully_shard` and DistributedDataParallel. Exits with 1 if a check fails. `--cpu` runs the same on
gloo with small sizes.
"""

import argparse
import contextlib
import gc
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STRATEGIES = ("ddp", "fsdp", "hsdp")


def make_importable():
    """The repository's root is the package: give it that name where it is not installed."""
    try:
        import paceline  # noqa: F401
    except ImportError:
        place = Path(tempfile.mkdtemp(prefix="paceline-"))
        (place / "paceline").symlink_to(ROOT)
        sys.path.insert(0, str(place))
    sys.path.insert(0, str(ROOT / "examples"))


class Table:
    """What was checked; rank 0 prints each line at once."""

    def __init__(self, rank):
        self.rank, self.failed = rank, []

    def line(self, what, value, passed=True):
        if not passed:
            self.failed.append(what)
        if self.rank == 0:
            print(f"| {what:<62} | {value:<34} | {'ok' if passed else 'FAILED':<6} |", flush=True)

    @contextlib.contextmanager
    def guarded(self, what):
        """A check that raises is a line too, and the others go on."""
        try:
            yield
        except Exception as error:  # a test script: whatever it is, it is told
            traceback.print_exc()
            self.line(what, f"{type(error).__name__}: {error}"[:34], False)


def ranks_main(cpu):
    import torch
    import torch.distributed as dist
    from gpt import GPT
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, Dataset

    import paceline as pl
    from paceline.strategies import DDP, FSDP, HSDP

    rank = int(os.environ["RANK"])
    device = torch.device("cpu") if cpu else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if not cpu:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
    table = Table(rank)
    made = {"ddp": DDP, "fsdp": FSDP, "hsdp": lambda **options: HSDP(shard=2, **options)}
    shared = Path(os.environ["TWO_GPUS_FOLDER"])

    class Tokens(Dataset):
        def __init__(self, count, context):
            self.data = torch.randint(0, 256, (count, context + 1), generator=torch.Generator().manual_seed(1))

        def __len__(self):
            return len(self.data)

        def __getitem__(self, index):
            return self.data[index, :-1], self.data[index, 1:]

    class Small(GPT):
        """SGD shows wrongly scaled gradients, which Adam forgives."""

        def __init__(self, **options):
            super().__init__(layers=3, width=96, heads=4, context=32, **options)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)

    class Adam(Small):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=not cpu)

    def whole(module):
        return {
            n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().cpu()
            for n, p in module.named_parameters()
        }

    def difference(left, right):
        return max((left[name] - right[name]).abs().max().item() for name in right)

    class HostSyncs(pl.Callback):
        """What waits for the GPU in steps 5 to 7 raises; FSDP compares the ranks after 1, 2, 4, 8, ... steps."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 4:
                torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 7:
                torch.cuda.set_sync_debug_mode("default")

        def on_exception(self, trainer, pl_module, exception):
            torch.cuda.set_sync_debug_mode("default")

    def fit(
        strategy, kind=Small, steps=6, rows=30, save=None, resume=None, weights=None, options=None, model=None,
        **arguments,
    ):  # fmt: skip
        pl.seed_everything(3, verbose=False)
        module = kind(**(model or {}))
        trainer = pl.Trainer(
            strategy=made[strategy](**(options or {})), accelerator="cpu" if cpu else "gpu", devices=2, max_steps=steps,
            max_epochs=9, global_batch_size=8, logger=False, enable_progress_bar=False, enable_checkpointing=False,
            enable_model_summary=False, **arguments,
        )  # fmt: skip
        if weights:
            trainer.load_weights(weights)
        with contextlib.redirect_stdout(None):
            batches = DataLoader(Tokens(rows, 32), batch_size=2, pin_memory=not cpu)
            trainer.fit(module, batches, ckpt_path=resume)
        saved = trainer.save_checkpoint(save) if save else None
        return whole(module), saved

    def by_hand(steps=6, clip=None):
        """One process, one batch of 8: what every strategy must arrive at."""
        pl.seed_everything(3, verbose=False)
        module = Small()
        module.configure_model()
        module.to(device)
        optimizer = module.configure_optimizers()
        done = 0
        while done < steps:
            data = Tokens(30, 32)
            for start in range(0, 30, 8):
                rows = torch.stack(
                    [torch.cat([x, y[-1:]]) for x, y in map(data.__getitem__, range(start, min(start + 8, 30)))]
                )
                rows = rows.to(device)
                optimizer.zero_grad()
                F.cross_entropy(module(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
                if clip:
                    nn.utils.clip_grad_norm_(module.parameters(), clip)
                optimizer.step()
                done += 1
                if done == steps:
                    break
        return whole(module)

    def exact(on):
        torch.use_deterministic_algorithms(on)
        for kind in ("flash", "mem_efficient", "cudnn"):
            getattr(torch.backends.cuda, f"enable_{kind}_sdp")(not on)

    exact(True)
    if rank == 0:
        print(f"torch {torch.__version__}, {'gloo' if cpu else torch.cuda.get_device_name()}, 2 ranks", flush=True)
        print(f"| {'check':<62} | {'found':<34} | {'':<6} |\n|{'-' * 64}|{'-' * 36}|{'-' * 8}|", flush=True)

    # --- the numbers of one process -------------------------------------------------------------------------------
    plain, clipped = by_hand(), by_hand(clip=0.1)
    for name in STRATEGIES:
        what = f"{name}: weights after 6 steps beside one process"
        with table.guarded(what):
            found = difference(fit(name)[0], plain)
            table.line(what, f"{found:.1e}", found < 2e-6)
        what = f"{name}: with gradient_clip_val=0.1"
        with table.guarded(what):
            found = difference(fit(name, gradient_clip_val=0.1)[0], clipped)
            table.line(what, f"{found:.1e}", found < 2e-6)
        what = f"{name}: bf16-mixed beside float32"
        with table.guarded(what):
            found = difference(fit(name, precision="bf16-mixed")[0], plain)
            table.line(what, f"{found:.1e}", 0 < found < 5e-2)
        what = f"{name}: bf16-true"
        with table.guarded(what):
            found = fit(name, precision="bf16-true")[0]
            table.line(what, "finite", all(t.isfinite().all() and t.dtype == torch.bfloat16 for t in found.values()))
        what = f"{name}: nothing waits for the GPU in a step"
        if not cpu:
            with table.guarded(what):
                fit(name, steps=8, rows=80, callbacks=HostSyncs(), gradient_clip_val=0.1, precision="bf16-mixed")
                table.line(what, "0 host syncs")
    for options in ({"activation_checkpointing": True}, {"cpu_offload": True}, {"sync_every_micro_batch": False}):
        what = f"fsdp: {next(iter(options))}={next(iter(options.values()))}"
        with table.guarded(what):
            found = difference(fit("fsdp", options=options)[0], plain)
            table.line(what, f"{found:.1e}", found < 2e-6)
    with table.guarded("fsdp: 16-mixed"):
        found = difference(fit("fsdp", precision="16-mixed")[0], plain)
        table.line("fsdp: 16-mixed beside float32", f"{found:.1e}", 0 < found < 5e-2)

    # --- resuming ---------------------------------------------------------------------------------------------------
    paths = {}
    for name in STRATEGIES:
        what = f"{name}: 3 + 3 steps with dropout beside 6, to the bit"
        with table.guarded(what):
            model = {"dropout": 0.2}
            straight, _ = fit(name, Adam, model=model)
            _, path = fit(name, Adam, steps=3, save=str(shared / f"{name}-bits.ckpt"), model=model)
            resumed, _ = fit(name, Adam, resume=path, model=model)
            found = sum((straight[n] != resumed[n]).sum().item() for n in straight)
            table.line(what, f"{found} numbers differ", found == 0)
        with table.guarded(f"{name}: saves"):
            _, paths[name] = fit(name, steps=3, save=str(shared / f"{name}.ckpt"))
    for source in paths:
        for target in STRATEGIES:
            what = f"checkpoint of {source} goes on under {target}"
            with table.guarded(what):
                found = difference(fit(target, resume=paths[source])[0], plain)
                table.line(what, f"{found:.1e}", found < 2e-6)

    for name in ("fsdp", "hsdp"):
        what = f"{name}: load_weights of ddp's checkpoint, 1 step, beside ddp"
        with table.guarded(what):
            found = difference(*(fit(one, steps=1, weights=paths["ddp"])[0] for one in (name, "ddp")))
            table.line(what, f"{found:.1e}", found < 2e-6)

    # --- speed and memory -------------------------------------------------------------------------------------------
    exact(False)
    sizes = {"layers": 2, "width": 128, "heads": 4} if cpu else {"layers": 24, "width": 2048, "heads": 16}
    context, batch_size, steps = (64, 2, 4) if cpu else (1024, 8, 12)
    data = Tokens(batch_size * 2 * steps, context)

    class Clock(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 4 or trainer.global_step == steps or cpu:
                if not cpu:
                    torch.cuda.synchronize()
                self.times = [*getattr(self, "times", []), time.perf_counter()]

    def report(what, seconds, peak, beside=None):
        said = f"{seconds * 1e3:.1f} ms a step, {peak / 2**30:.2f} GiB"
        passed = True
        if beside is not None:
            said += f", x{seconds / beside[0]:.3f}"
            passed = cpu or (seconds < 1.05 * beside[0] and peak < 1.05 * beside[1])
        table.line(what, said, passed)
        return seconds, peak

    def start():
        gc.collect()  # what was trained before is in reference cycles
        if not cpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak():
        return 0 if cpu else torch.cuda.max_memory_allocated()

    def hand_written(strategy):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        start()
        pl.seed_everything(3, verbose=False)
        module = GPT(**sizes, context=context)
        module.configure_model()
        model = module.to(device)
        if strategy == "fsdp":
            mesh = init_device_mesh(device.type, (2,))
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            for block in module.blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(module, mesh=mesh, mp_policy=policy)
            start()
        else:
            model = nn.parallel.DistributedDataParallel(
                module, device_ids=None if cpu else [device], gradient_as_bucket_view=True
            )
        optimizer = module.configure_optimizers()["optimizer"]
        mine = torch.utils.data.Subset(data, range(rank, len(data), 2))
        times = []
        for number, (x, y) in enumerate(DataLoader(mine, batch_size=batch_size, pin_memory=not cpu), 1):
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=strategy == "ddp"):
                logits = model(x)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            if number in (4, steps) or cpu:
                if not cpu:
                    torch.cuda.synchronize()
                times.append(time.perf_counter())
        return (times[-1] - times[0]) / (steps - (1 if cpu else 4)), peak()

    def paceline(strategy, options=None, how=False):
        start()
        pl.seed_everything(3, verbose=False)
        module, clock = GPT(**sizes, context=context), Clock()
        trainer = pl.Trainer(
            strategy=made[strategy](**(options or {})), accelerator="cpu" if cpu else "gpu", devices=2, max_steps=steps,
            precision="bf16-mixed", gradient_clip_val=1.0, callbacks=clock, logger=False, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False, compile=how,
        )  # fmt: skip
        with contextlib.redirect_stdout(None):
            trainer.fit(module, DataLoader(data, batch_size=batch_size, pin_memory=not cpu))
        seconds = (clock.times[-1] - clock.times[0]) / (steps - (1 if cpu else 4))
        return seconds, peak()

    for name, options in (("fsdp", {"autocast": False}), ("ddp", {})):
        with table.guarded(f"hand-written {name} loop"):
            by_hand, ours = [], []
            for _ in range(2):  # in turns, for rounds differ
                by_hand.append(hand_written(name))
                ours.append(paceline(name, options))
            beside = report(f"hand-written {name} loop, 1.2 billion, bf16", *min(by_hand))
            how = "".join(f", {k}={v}" for k, v in options.items())
            report(f"{name}{how}: the same, x the hand-written one's time", *min(ours), beside)
    for name, options in (
        ("fsdp", {}),
        ("hsdp", {}),
        ("fsdp", {"forward_prefetch": 1}),
        ("fsdp", {"reshard_after_forward": False}),
        ("fsdp", {"activation_checkpointing": True}),
        ("fsdp", {"cpu_offload": True}),
    ):
        what = f"{name}: the same{''.join(f', {k}={v}' for k, v in options.items())}"
        with table.guarded(what):
            report(what, *paceline(name, options))
    for name in () if cpu else STRATEGIES:
        what = f"{name}: the same, every block compiled"
        with table.guarded(what):
            report(what, *paceline(name, how="blocks"))

    if rank == 0:
        print(f"failed: {', '.join(table.failed) or 'nothing'}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 1 if table.failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="two CPU ranks and small sizes")
    cpu = parser.parse_args().cpu
    if "RANK" in os.environ:
        make_importable()
        sys.exit(ranks_main(cpu))
    with tempfile.TemporaryDirectory(prefix="two-gpus-") as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        environment = {**os.environ, "TWO_GPUS_FOLDER": folder, "OMP_NUM_THREADS": "1" if cpu else "8"}
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else matrix products are not repeatable
        sys.exit(subprocess.run([*command, *(["--cpu"] if cpu else [])], env=environment, check=False).returncode)
