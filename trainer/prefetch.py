"""Batches on their way to the device: `move` for one batch, `ahead` for a stream of them.

On a GPU the next batch is copied on a side stream while this one is trained on. A batch's host memory is kept until
its copy is done, since the batch holds it until the next one has been taken.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError


def move(batch: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """`batch` with its tensors on `device`, floating-point ones as `dtype` if given.

    Knows tensors, dicts and their like, lists, (named) tuples, dataclasses and everything with a `to` method; numbers,
    strings and other leaves stay as they are. Copies from pinned memory do not block.
    """
    if isinstance(batch, Tensor):
        wanted = dtype if dtype is not None and batch.is_floating_point() else None
        if batch.device == device and wanted is None:
            return batch
        return batch.to(device, wanted, non_blocking=True)
    if isinstance(batch, (str, bytes, int, float)) or batch is None:
        return batch
    if hasattr(batch, "to"):
        return _by_its_own(batch, device)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(item, device, dtype) for item in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)([move(item, device, dtype) for item in batch])
    if isinstance(batch, MutableMapping):
        moved = {key: move(item, device, dtype) for key, item in batch.items()}
        if type(batch) is dict:
            return moved
        like = copy.copy(batch)
        like.update(moved)
        return like
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved_fields = {f.name: move(getattr(batch, f.name), device, dtype) for f in dataclasses.fields(batch)}
        copied: Any = copy.copy(batch)
        for name, value in moved_fields.items():
            object.__setattr__(copied, name, value)
        return copied
    return batch


def _by_its_own(batch: Any, device: torch.device) -> Any:
    """A batch that knows how to move itself, as transformers' BatchEncoding or a PackedSequence."""
    try:
        return batch.to(device)
    except (TypeError, AttributeError, RuntimeError) as error:
        raise ConfigurationError(
            f"A {type(batch).__name__} in the batch could not be moved: its to({str(device)!r}) failed with {error!r}. "
            "Override transfer_batch_to_device in your module or data module."
        ) from error


def ahead(batches: Iterator[Any], transfer: Callable[[Any], Any], device: torch.device) -> Iterator[Any]:
    """`transfer(batch)` for each of `batches`, one batch ahead on a side stream of a CUDA device.

    Batch i + 1 is copied while batch i is trained on. Its copy waits for the kernels of batch i - 1, whose memory it
    may be given; so no tensor has to be registered with the allocator, however deep in a batch it is.
    """
    side = torch.cuda.Stream(device)
    moved: Any = None
    held: Any = None
    for host_batch in batches:
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            coming = transfer(host_batch)
        if held is not None:
            yield moved
        torch.cuda.current_stream(device).wait_stream(side)
        moved, held = coming, host_batch
    if held is not None:
        yield moved
