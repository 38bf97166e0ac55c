"""Queues inside the workers of PyTorch's DataLoader and the processes of torch.multiprocessing."""

from __future__ import annotations

import contextlib
import importlib
import os
from typing import Any

import pytest
from support.workers import may_fork

from ringshm import JoinableQueue, Queue

torch: Any = pytest.importorskip("torch")
importlib.import_module("torch.multiprocessing")
importlib.import_module("torch.utils.data")

pytestmark = may_fork
methods = pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])


class Reporting(torch.utils.data.Dataset):  # type: ignore[misc]
    """Says in a queue which process has loaded which sample."""

    def __init__(self, reports: Any) -> None:
        self.reports = reports

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        self.reports.put((os.getpid(), index, torch.full((2, 3), index)))
        return torch.full((3,), float(index))


class Fed(torch.utils.data.IterableDataset):  # type: ignore[misc]
    """Yields what comes in a queue, until None does."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        return iter(self.samples.get, None)


def worker_of_torch(rank: int, tasks: Any, results: Any) -> None:
    for tensor in iter(tasks.get, None):
        results.put((rank, tensor * 2))
        tasks.task_done()
    tasks.task_done()


@methods
def test_workers_of_a_data_loader_put_into_a_queue(method: str) -> None:
    with contextlib.closing(Queue()) as reports:
        loader = torch.utils.data.DataLoader(
            Reporting(reports), batch_size=3, num_workers=2, multiprocessing_context=method
        )
        batches = list(loader)
        assert torch.equal(torch.cat(batches)[:, 0], torch.arange(12.0))
        messages = [reports.get(timeout=30) for _ in range(12)]
        assert sorted(index for _, index, _ in messages) == list(range(12))
        assert len({pid for pid, _, _ in messages} - {os.getpid()}) == 2
        assert all(torch.equal(tensor, torch.full((2, 3), index)) for _, index, tensor in messages)


@methods
def test_workers_of_a_data_loader_get_from_a_queue(method: str) -> None:
    with contextlib.closing(Queue()) as samples:
        loader = torch.utils.data.DataLoader(
            Fed(samples), batch_size=None, num_workers=2, multiprocessing_context=method
        )
        samples.put_many([torch.full((4,), n) for n in range(10)])
        samples.put_many([None, None])
        assert sorted(int(sample[0]) for sample in loader) == list(range(10))


@methods
def test_processes_of_torch_multiprocessing_share_queues(method: str) -> None:
    """Tensors are copied through the ring, also where PyTorch would pass handles of files."""
    tasks: JoinableQueue[Any] = JoinableQueue()
    results: Queue[Any] = Queue()
    with contextlib.closing(tasks), contextlib.closing(results):
        context = torch.multiprocessing.start_processes(
            worker_of_torch, (tasks, results), nprocs=2, join=False, start_method=method
        )
        for n in range(8):
            tasks.put(torch.full((100,), n))
        assert tasks.join(60)
        got = [results.get(timeout=30) for _ in range(8)]
        assert sorted(int(tensor[0]) for _, tensor in got) == [2 * n for n in range(8)]
        assert not any(tensor.is_shared() for _, tensor in got)
        tasks.put_many([None, None])
        while not context.join():
            pass
        assert tasks.join(0)
