"""Errors and times on a GPU, for gpu_check.py: CUDA graphs over weights that rotate through more than the L2 cache."""

import statistics

import torch


TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ROTATED_BYTES = 256 * 2**20


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()


def graph(function, calls: int):
    """A CUDA graph of function(0) ... function(calls - 1), warmed up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(min(calls, 2)):
            function(i)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        for i in range(calls):
            function(i)
    return captured


def time_alternately(graphs: dict, calls: int, rounds: int = 15) -> dict[str, float]:
    """Median microseconds of one of the `calls` in each graph, the graphs replayed in turn."""
    times = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, captured in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            captured.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1000 / calls)
    return {name: statistics.median(values) for name, values in times.items()}
