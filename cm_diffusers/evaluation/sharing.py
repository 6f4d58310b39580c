"""Work on many items, shared out over the processes that accelerate knows of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from torch import Tensor
from tqdm.auto import tqdm


def map_shared(
    count: int, batch_size: int, work: Callable[[Sequence[int]], tuple[Tensor, ...]], description: str
) -> tuple[Tensor, ...]:
    """The results of `work` on the items 0 to `count - 1`, in their order, on the CPU, the same on all processes.

    Args:
        count (`int`): at least 1.
        batch_size (`int`): items of one call, on each process.
        work (`Callable`): from indices to tensors whose first dimension is theirs.
        description (`str`): of the progress bar.

    What `work` raises on one process, all raise.
    """
    state = PartialState()
    share = math.ceil(count / state.num_processes)
    # Everyone has as much to do; what there is too much of is dropped.
    mine = [(state.process_index + turn * state.num_processes) % count for turn in range(share)]
    bar = tqdm(total=share, desc=description, leave=False, disable=not state.is_main_process)
    found: list[tuple[Tensor, ...]] = []
    failed: Exception | None = None
    try:
        for start in range(0, share, batch_size):
            found.append(tuple(part.cpu() for part in work(mine[start : start + batch_size])))
            bar.update(len(mine[start : start + batch_size]))
    except Exception as error:
        failed = error
    bar.close()
    for failure in gather_object([failed]):
        if failure is not None:
            raise failure
    return tuple(_gathered(torch.cat(parts), count) for parts in zip(*found, strict=True))


def _gathered(part: Tensor, count: int) -> Tensor:
    state = PartialState()
    if state.num_processes == 1:
        return part
    by_process = gather(part.to(state.device).contiguous()).cpu().unflatten(0, (state.num_processes, -1))
    return by_process.transpose(0, 1).flatten(0, 1)[:count]
