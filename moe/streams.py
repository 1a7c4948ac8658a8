"""Runs the tasks of a schedule on the resources of this rank: what `moe.simulator` simulates, issued for real.

One host thread issues the tasks in launch order. On CUDA a resource is a stream: `compute` the current one, `inter` and
`intra` streams of their own, and a task waits for others by events, so the host runs ahead. Elsewhere a collective is
under way from its issue until somebody waits for its handle, and the host computes meanwhile; collectives of one
resource are issued in launch order, the same on all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from moe.schedules import COMPUTE, INTER, INTRA
from moe.simulator import Span, Task

Action = Callable[[int], dist.Work | None]
"""Does a task of the given chunk: computes, or starts a collective with `async_op=TaskRunner.asynchronous`, and returns
its handle if it has one."""


SPARED_MULTIPROCESSORS = 16
"""That matrix products leave to collectives beside them. A product's programs and a collective's both stay on their
multiprocessors to the end: without room for both, whichever comes second waits for the whole of the other. NCCL takes
one for each of its channels: 2 over the sockets of two H200, where 8, 16 and 32 spared ones were about as good (seen
once, no file here). Between GPUs of one node it has more, and this number is not tuned for them."""


@contextmanager
def room_for_collectives() -> Iterator[None]:
    """Inside, matrix products by cuBLASLt and `grouped_mm` leave multiprocessors free, where this torch knows how: the
    switch is experimental, and may go."""
    if not hasattr(torch._C, "_set_sm_carveout_experimental"):
        yield
        return
    before = torch._C._get_sm_carveout_experimental()
    torch._C._set_sm_carveout_experimental(SPARED_MULTIPROCESSORS)
    try:
        yield
    finally:
        torch._C._set_sm_carveout_experimental(before)


class Recorder:
    """When tasks ran, on this rank.

    Attributes:
        events: (`issue` or `complete`, task) in the order in which the host issued and saw complete; on CUDA the host
            sees no completion.
    """

    def __init__(self) -> None:
        self.events: list[tuple[str, Task]] = []
        self._marks: list[tuple[Task, list[Any]]] = []
        self._origin: Any = None

    def clear(self) -> None:
        """Forget what was recorded; a new timeline begins."""
        self.events, self._marks, self._origin = [], [], None

    def issued(self, task: Task, on_cuda: bool) -> list[Any]:
        """Mark a task's start, on CUDA in the current stream. What is appended to the result first marks its end."""
        marks = [now(on_cuda)]
        self._origin = self._origin or marks[0]
        self.events.append(("issue", task))
        self._marks.append((task, marks))
        return marks

    def spans(self) -> list[Span]:
        """Of all tasks, in launch order, in seconds since the first one's start. On CUDA waits for the GPU."""
        if isinstance(self._origin, torch.cuda.Event):
            torch.cuda.synchronize()
        return [Span(task, self._since_s(marks[0]), self._since_s(marks[:2][-1])) for task, marks in self._marks]

    def _since_s(self, mark: Any) -> float:
        if isinstance(mark, torch.cuda.Event):
            return float(self._origin.elapsed_time(mark)) / 1e3
        return float(mark - self._origin)


def now(on_cuda: bool) -> Any:
    """A moment: an event in the current stream, else seconds of the host."""
    if not on_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class TaskRunner:
    """Issues tasks to streams, or to the host and its asynchronous collectives.

    Args:
        device: of this rank.
        recorder: told of every task; None records nothing.
    """

    def __init__(self, device: torch.device, recorder: Recorder | None = None) -> None:
        self.recorder = recorder
        self.on_cuda = device.type == "cuda"
        self._streams = side_streams(device) if self.on_cuda else {}

    @property
    def asynchronous(self) -> bool:
        """What actions pass as `async_op`: on CUDA a collective is ordered by the stream that it is called in."""
        return not self.on_cuda

    def room(self) -> Any:
        """A context in which matrix products leave room for collectives beside them."""
        return room_for_collectives() if self.on_cuda else nullcontext()

    def run(self, tasks: Sequence[Task], actions: Mapping[str, Action], last: Sequence[int]) -> None:
        """Issue all tasks.

        Args:
            tasks: in launch order; those of `compute` run on the current stream, or on the host.
            actions: by the kind of a task.
            last: tasks that must have ended for what follows on the current stream, or on the host. Buffers of all
                others must live until somebody waits for them.
        """
        if self.on_cuda:
            self._run_streams(tasks, actions, last)
        else:
            self._run_host(tasks, actions, last)

    def beside(self, task: Task, action: Action) -> dist.Work | None:
        """Issue one collective that nothing here waits for, behind what its resource and the current stream were given
        before.

        Returns:
            Its handle, to be waited for by the caller; None on CUDA, where `join` waits.
        """
        if task.resource in self._streams:
            self._streams[task.resource].wait_stream(torch.cuda.current_stream())
        with self._on(task):
            marks = self.recorder.issued(task, self.on_cuda) if self.recorder else None
            work = action(task.chunk)
            self._note_end(marks, task, work)
        return work

    def join(self) -> None:
        """Make the current stream wait for all that was issued to the others; nothing on the host."""
        for stream in self._streams.values():
            torch.cuda.current_stream().wait_stream(stream)

    def _run_streams(self, tasks: Sequence[Task], actions: Mapping[str, Action], last: Sequence[int]) -> None:
        current = torch.cuda.current_stream()
        ends: list[torch.cuda.Event] = []
        for stream in self._streams.values():
            stream.wait_stream(current)
        overlapped = sum(task.resource == COMPUTE for task in tasks) > 1 or any(t.kind == "all_reduce" for t in tasks)
        with self.room() if overlapped else nullcontext():
            try:
                for task in tasks:
                    stream = self._streams.get(task.resource, current)
                    torch.cuda.set_stream(stream)
                    for earlier in task.after:
                        if tasks[earlier].resource != task.resource:
                            stream.wait_event(ends[earlier])
                    marks = self.recorder.issued(task, True) if self.recorder else None
                    actions[task.kind](task.chunk)
                    end = torch.cuda.Event(enable_timing=marks is not None)
                    end.record(stream)
                    ends.append(end)
                    if marks is not None:
                        marks.append(end)
            finally:
                torch.cuda.set_stream(current)
        for index in last:
            current.wait_event(ends[index])

    def _on(self, task: Task) -> Any:
        stream = self._streams.get(task.resource)
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def _run_host(self, tasks: Sequence[Task], actions: Mapping[str, Action], last: Sequence[int]) -> None:
        flights: dict[int, tuple[dist.Work, list[Any] | None]] = {}

        def land(index: int) -> None:
            if index in flights:
                work, marks = flights.pop(index)
                work.wait()
                if self.recorder and marks is not None:
                    marks.append(now(False))  # should the thread that carried it out have been late to mark it
                    self.recorder.events.append(("complete", tasks[index]))

        for index, task in enumerate(tasks):
            for earlier in task.after:
                land(earlier)
            marks = self.recorder.issued(task, False) if self.recorder else None
            work = actions[task.kind](task.chunk)
            if work is not None:
                flights[index] = work, marks
            self._note_end(marks, task, work)
        for index in last:
            land(index)

    def _note_end(self, marks: list[Any] | None, task: Task, work: dist.Work | None) -> None:
        if marks is None or self.recorder is None:
            return
        if work is not None:  # marked by the thread that carries it out, or else when the host sees it complete
            with suppress(RuntimeError):  # gloo's reduce-scatter has no future
                work.get_future().then(lambda _future: marks.append(now(False)))
            return
        marks.append(now(self.on_cuda))
        if not self.on_cuda:
            self.recorder.events.append(("complete", task))


@cache
def side_streams(device: torch.device) -> dict[str, torch.cuda.Stream]:
    """The streams of the links, one set a device for all layers, so that these do not overtake each other. Of high
    priority: a collective that waits for multiprocessors behind a matrix product overlaps nothing."""
    return {name: torch.cuda.Stream(device, priority=-1) for name in (INTER, INTRA)}
