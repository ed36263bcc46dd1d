"""Fair timings: candidates take turns, and each call meets weights that no cache holds."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
GRAPH_CALLS = 20  # Calls in one CUDA graph: launching it costs next to nothing beside them.


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        seconds: of every repetition.
    """

    seconds: tuple[float, ...]

    @property
    def least(self) -> float:
        """The fastest repetition: what the machine does when nothing else runs."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The repetition in the middle."""
        return statistics.median(self.seconds)


def take_turns(candidates: Mapping[str, Sequence[Call]], repetitions: int, device: torch.device) -> dict[str, Timing]:
    """Time candidates against each other.

    Args:
        candidates: name -> calls that do the same on different copies of the weights, so that a call does not find its
            weights in a cache because the one before used them.
        repetitions: of each candidate; in every one, all candidates have a turn.
        device: where they run. On CUDA, calls are captured in a graph and replayed.
    """
    if device.type == "cuda":
        candidates = {name: [_graph(calls, device)] for name, calls in candidates.items()}
    for calls in candidates.values():
        for call in calls:  # Some prepare their weights in the first call, each copy by itself.
            call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repetition in range(repetitions):
        for name, calls in candidates.items():
            seconds[name].append(_timed(calls[repetition % len(calls)], device))
    per_call = GRAPH_CALLS if device.type == "cuda" else 1
    return {name: Timing(tuple(each / per_call for each in found)) for name, found in seconds.items()}


def _timed(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    call()
    end_event.record()
    torch.cuda.synchronize(device)
    return float(start_event.elapsed_time(end_event)) / 1e3


def _graph(calls: Sequence[Call], device: torch.device) -> Call:
    """One call that replays `GRAPH_CALLS` of them."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(GRAPH_CALLS):
            calls[index % len(calls)]()
    return graph.replay


def read_bandwidth(device: torch.device, size: int = 1 << 29, repetitions: int = 8) -> float:
    """Bytes per second of a sum over memory that no cache holds, the best of some: what reading alone would take."""
    memory = torch.ones(size // 8, dtype=torch.int64, device=device)
    timing = take_turns({"read": [memory.sum]}, repetitions, device)["read"]
    return size / timing.least
