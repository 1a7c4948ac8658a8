"""An event simulator of a training step: tasks on resources, each task as long as a fitted cost says.

A resource is anything that does one thing at a time: a rank's compute stream, a level's link, or those of one rank that
stands for all where all are alike. A task is abstract: it says what is done, how much of it and after what; the list of
tasks that is simulated here is meant to be issued to real streams. Tasks stand in launch order, the order in which one
host thread issues them: a resource takes its tasks in that order, as a CUDA stream does, and waits for the next one
even where a later one could start. `background` tasks are the exception: they fill a resource's gaps.

Not modelled: uneven routing (every rank and expert gets as much) and skew between ranks (one rank stands for all). That
operations slow each other, since they share links, multiprocessors or cores, is what `contention` says.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moe.costs import AlphaBeta

MEASURED = "measured"
"""Operation of a task whose work is its time in seconds: what was measured and need not be modelled."""

Costs = Mapping[str, AlphaBeta]
"""What an operation (`all_to_all`, `gemm`, ...) costs by its work: bytes for a collective, multiply-adds for a matrix
multiplication (whose beta then is seconds per multiply-add)."""


@dataclass(frozen=True)
class Task:
    """One thing that one resource does.

    Args:
        kind: what it is in its schedule: `dispatch`, `experts`, `attention`, ...
        resource: what does it.
        operation: key of its cost, or `MEASURED`.
        work: in the unit of that cost, >= 0.
        calls: how many latencies it pays (a GELU expert is two matrix multiplications).
        after: indices of earlier tasks in launch order that must have ended.
        layer: index of the layer, in the order of the forward pass.
        chunk: index of the chunk of a pipelined layer.
        backward: of the backward pass.
        background: runs where its resource would idle, after what is launched in order and already free to start; not
            interrupted once it has begun.
    """

    kind: str
    resource: str
    operation: str
    work: float
    calls: int = 1
    after: tuple[int, ...] = ()
    layer: int = 0
    chunk: int = 0
    backward: bool = False
    background: bool = False


@dataclass
class Program:
    """Tasks in launch order, being written."""

    tasks: list[Task] = field(default_factory=list)

    def add(self, task: Task) -> int:
        """Launch a task after those before; its index, for the `after` of later ones."""
        assert all(0 <= index < len(self.tasks) for index in task.after), f"{task} waits for what is not launched yet"
        self.tasks.append(task)
        return len(self.tasks) - 1


class Span(NamedTuple):
    """When a task ran, in seconds since the step's start."""

    task: Task
    start_s: float
    end_s: float


def task_s(task: Task, costs: Costs) -> float:
    """Seconds of a task: calls * alpha + work * beta.

    Raises:
        KeyError: `costs` has none of that operation.
    """
    if task.operation == MEASURED:
        return task.work
    cost = costs[task.operation]
    return task.calls * cost.alpha_s + task.work * cost.beta_s_per_byte


def simulate(
    tasks: Sequence[Task],
    costs: Costs | Callable[[Task], float],
    contention: Mapping[tuple[str, str], float] | None = None,
) -> list[Span]:
    """Run the tasks.

    Args:
        tasks: in launch order.
        costs: of their operations, or a function that gives a task's seconds (a recorded profile).
        contention: pairs of resources that slow each other while both work, and how many times as long each one's task
            then takes, >= 1 (2: no faster than one after the other). None: all are independent.

    Returns:
        A span for every task, in launch order.
    """
    run = _Run(tasks, costs if callable(costs) else lambda task: task_s(task, costs), contention or {})
    run.start_what_can({task.resource: None for task in tasks}, 0.0)
    while run.ends:
        now_s = run.ends[0].at_s
        touched: dict[str, None] = {}  # a dict keeps their order, so that equal inputs give equal timelines
        while run.ends and run.ends[0].at_s == now_s:  # all that ends now, before anything begins now
            run.end(heapq.heappop(run.ends), touched)
        run.start_what_can(touched, now_s)
    ran = [span for span in run.spans if span is not None]
    assert len(ran) == len(tasks), "launch order is a topological order, so every task gets its turn"
    return ran


class _End(NamedTuple):
    """When a task (its index) ends, if nothing changes until then."""

    at_s: float
    task: int
    version: int


@dataclass
class _Working:
    """What a resource is doing: `left_s` seconds of its own, at `rate` of them a second, since `since_s`."""

    task: int
    start_s: float
    left_s: float
    since_s: float
    rate: float = 1.0
    version: int = 0


class _Run:
    """State of a simulation."""

    def __init__(
        self, tasks: Sequence[Task], seconds: Callable[[Task], float], contention: Mapping[tuple[str, str], float]
    ) -> None:
        self.tasks, self.seconds = tasks, seconds
        self.slows: dict[str, dict[str, float]] = defaultdict(dict)
        for (one, other), factor in contention.items():
            assert one != other and factor >= 1, f"contention of {one} and {other}: {factor}"
            self.slows[one][other] = self.slows[other][one] = factor
        self.followers: dict[int, list[int]] = defaultdict(list)
        self.waits_for = [len(task.after) for task in tasks]
        self.in_order: dict[str, deque[int]] = defaultdict(deque)
        # Heaps of those free to start, the first launched on top.
        self.fillers: dict[str, list[int]] = defaultdict(list)
        for index, task in enumerate(tasks):
            for earlier in task.after:
                assert earlier < index, f"task {index} waits for task {earlier}, which is launched later"
                self.followers[earlier].append(index)
            if not task.background:
                self.in_order[task.resource].append(index)
            elif not task.after:
                self.fillers[task.resource].append(index)
        self.working: dict[str, _Working] = {}
        self.ends: list[_End] = []
        self.spans: list[Span | None] = [None] * len(tasks)

    def start_what_can(self, resources: Iterable[str], now_s: float) -> None:
        """The next task of each of these resources, if it is idle and something is free to start."""
        for resource in resources:
            if resource in self.working:
                continue
            queue = self.in_order[resource]
            if queue and not self.waits_for[queue[0]]:
                index = queue.popleft()
            elif self.fillers[resource]:
                index = heapq.heappop(self.fillers[resource])
            else:
                continue
            self.working[resource] = _Working(index, now_s, self.seconds(self.tasks[index]), now_s)
            self._retime(resource, now_s)
            self._retime_neighbours(resource, now_s)

    def end(self, event: _End, touched: dict[str, None]) -> None:
        """Note a task's end, and in `touched` whose resources may have something to start."""
        task = self.tasks[event.task]
        working = self.working.get(task.resource)
        if working is None or working.task != event.task or working.version != event.version:
            return  # its end has moved
        del self.working[task.resource]
        self.spans[event.task] = Span(task, working.start_s, event.at_s)
        self._retime_neighbours(task.resource, event.at_s)
        touched[task.resource] = None
        for index in self.followers[event.task]:
            self.waits_for[index] -= 1
            follower = self.tasks[index]
            if not self.waits_for[index]:
                touched[follower.resource] = None
                if follower.background:
                    heapq.heappush(self.fillers[follower.resource], index)

    def _retime_neighbours(self, resource: str, now_s: float) -> None:
        for neighbour in self.slows[resource]:
            if neighbour in self.working:
                self._retime(neighbour, now_s)

    def _retime(self, resource: str, now_s: float) -> None:
        """When the resource's task will end, by who works beside it now."""
        working = self.working[resource]
        working.left_s -= (now_s - working.since_s) * working.rate
        working.since_s = now_s
        working.rate = 1.0
        for neighbour, factor in self.slows[resource].items():
            if neighbour in self.working:
                working.rate /= factor
        working.version += 1
        heapq.heappush(self.ends, _End(now_s + max(0.0, working.left_s) / working.rate, working.task, working.version))


def makespan_s(spans: Iterable[Span]) -> float:
    """End of the last task in seconds; 0 without tasks."""
    return max((span.end_s for span in spans), default=0.0)


def busy_s(spans: Iterable[Span]) -> dict[str, float]:
    """Seconds that each resource works."""
    totals: dict[str, float] = defaultdict(float)
    for span in spans:
        totals[span.task.resource] += span.end_s - span.start_s
    return dict(totals)


def overlap_s(spans: Sequence[Span], resource: str, other: str) -> float:
    """Seconds in which both resources work: what a schedule hides of one behind the other."""
    total = 0.0
    others = [span for span in spans if span.task.resource == other]
    for span in spans:
        if span.task.resource == resource:
            total += sum(max(0.0, min(span.end_s, o.end_s) - max(span.start_s, o.start_s)) for o in others)
    return total
