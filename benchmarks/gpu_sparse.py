"""The sparse part of gpu_check.py: errors and times of the sparse operators, and of PyTorch's 2:4 layers."""

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gpu_timing import ROTATED_BYTES, TOLERANCE, graph, relative_error, time_alternately

from optimum_slim._kernels import (
    pack_codes,
    pack_mask,
    pack_values,
    sparse_linear,
    sparse_linear_dx,
    sparse_linear_dx_reference,
    sparse_linear_reference,
)
from optimum_slim.semi_structured import semi_structured, working_backend


TIMED_SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
TIMED_TOKENS = (1, 4, 16, 128)
SEMI_STRUCTURED_TOKENS = (128, 2048, 8192)
CALLS = 64
"""Products in a CUDA graph; the weights rotate through more memory than the L2 cache holds."""


@dataclass(frozen=True)
class Form:
    """A way to store a sparse layer; `kept` is the share of the columns a bitmask keeps."""

    name: str
    keep: int = 0
    kept: float = 0.5
    bits: int = 0
    group_size: int | None = None

    def arguments(self, out_features: int, columns: int) -> tuple:
        """(weight, values, rows, scale, zero) and (keep, bits, group_size) of a random layer on the GPU."""
        noise = torch.rand(out_features, columns, device="cuda")
        mask = noise < self.kept if self.keep == 0 else keep_largest(noise, self.keep)
        weight = pack_mask(mask.clone(), self.keep)
        group_size = self.group_size or columns
        if self.bits == 0:
            dense = torch.randn(out_features, columns, device="cuda").bfloat16()
            values, rows = pack_values(dense, mask, self.keep, ragged=self.keep == 0)
            return (weight, values, rows, None, None), (self.keep, 0, columns)
        codes = torch.randint(2**self.bits, (out_features, columns), device="cuda", dtype=torch.uint8)
        values, rows = pack_codes(codes, mask, self.bits, self.keep, ragged=self.keep == 0)
        grid = (out_features, -(-columns // group_size))
        scale = torch.rand(grid, device="cuda").half() + 0.1
        zero = torch.randint(2**self.bits, grid, device="cuda", dtype=torch.uint8)
        return (weight, values, rows, scale, zero), (self.keep, self.bits, group_size)


HALF, SEVENTY, PAIRS = Form("50 %"), Form("70 %", kept=0.3), Form("2:4", keep=2)
PAIRS_4, HALF_4 = Form("2:4 + 4 bits", keep=2, bits=4), Form("50 % + 4 bits", bits=4)
TIMED_FORMS = (HALF, SEVENTY, PAIRS, PAIRS_4, HALF_4)
GROUPED = Form("50 % + 4 bits, groups of 128", bits=4, group_size=128)
ODD_FORMS = (HALF, PAIRS, Form("1:4", keep=1), Form("50 % + 3 bits", bits=3), Form("2:4 + 8 bits", keep=2, bits=8))


def keep_largest(noise: torch.Tensor, keep: int) -> torch.Tensor:
    """A mask of the `keep` largest of every 4 columns; a short last group keeps its first."""
    columns = noise.shape[1]
    groups = F.pad(noise, (0, -columns % 4), value=-1).unflatten(1, (-1, 4))
    return (
        torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.topk(keep).indices, True).flatten(1)[:, :columns]
    )


@dataclass(frozen=True)
class Case:
    """A layer, the dtype of x, and the numbers of tokens to check it with (the last ones many)."""

    out_features: int
    columns: int
    form: Form
    dtype: torch.dtype
    tokens: tuple[int, ...]

    def calls(self) -> Iterator[tuple]:
        """(operator, reference, arguments): the products, then dx."""
        tensors, numbers = self.form.arguments(self.out_features, self.columns)
        bias = torch.randn(self.out_features, device="cuda", dtype=self.dtype)
        for tokens in self.tokens:
            x = torch.randn(tokens, self.columns, device="cuda", dtype=self.dtype)
            yield sparse_linear, sparse_linear_reference, (x, *tensors, bias, *numbers)
        dy = torch.randn(17, self.out_features, device="cuda", dtype=self.dtype)
        yield sparse_linear_dx, sparse_linear_dx_reference, (dy, *tensors, self.columns, *numbers)


def checked_cases() -> list[Case]:
    bf16 = torch.bfloat16
    cases = [Case(4096, 4096, form, bf16, (1, 4, 16, 17)) for form in (*TIMED_FORMS, GROUPED)]
    cases += [Case(11008, 4096, form, bf16, (1, 4, 16, 17)) for form in TIMED_FORMS]
    cases += [Case(130, 300, form, bf16, (2, 9, 17)) for form in ODD_FORMS]
    for dtype in (torch.float32, torch.float16):
        cases += [Case(512, 1024, form, dtype, (1, 9, 17)) for form in (HALF, PAIRS_4)]
    return cases


def run_once(case: Case) -> None:
    """Compile every kernel of a case into Triton's cache on disk."""
    for operator, _, arguments in case.calls():
        operator(*arguments)
    torch.cuda.synchronize()


def errors() -> Iterator[tuple[str, bool]]:
    """Rows of the table of errors, and whether each is within its tolerance."""
    cases = checked_cases()
    with multiprocessing.get_context("spawn").Pool(min(len(cases), max(1, (os.cpu_count() or 2) - 2))) as pool:
        pool.map(run_once, cases, chunksize=1)
    for case in cases:
        found = [
            relative_error(operator(*arguments), reference(*arguments))
            for operator, reference, arguments in case.calls()
        ]
        good = all(error <= TOLERANCE[case.dtype] for error in found)
        cells = " | ".join(f"{error:.1e}" for error in (found[0], max(found[1:-2]), found[-2], found[-1]))
        shape, dtype = f"{case.out_features} x {case.columns}", str(case.dtype).removeprefix("torch.")
        yield f"| {shape} | {case.form.name} | {dtype} | {cells} | {'ok' if good else 'FAIL'} |", good


def rotated(tensors: tuple) -> list[tuple]:
    """Copies of a layer that fill `ROTATED_BYTES`."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
    copies = max(2, ROTATED_BYTES // size)
    return [tuple(None if tensor is None else tensor.clone() for tensor in tensors) for _ in range(copies)]


def times() -> Iterator[str]:
    """Rows of the table of times."""
    for out_features, columns in TIMED_SHAPES:
        dense = rotated((torch.randn(out_features, columns, device="cuda").bfloat16(),))
        layers = {}
        for form in TIMED_FORMS:
            tensors, numbers = form.arguments(out_features, columns)
            layers[form.name] = rotated(tensors), numbers
        for tokens in TIMED_TOKENS:
            x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
            graphs = {"F.linear": graph(lambda i, x=x, dense=dense: F.linear(x, *dense[i % len(dense)]), CALLS)}
            for name, (copies, numbers) in layers.items():

                def call(i, x=x, copies=copies, numbers=numbers):
                    return sparse_linear(x, *copies[i % len(copies)], None, *numbers)

                graphs[name] = graph(call, CALLS)
            found = time_alternately(graphs, CALLS)
            base = found.pop("F.linear")
            cells = " | ".join(f"{time:.1f} ({base / time:.2f}x)" for time in found.values())
            yield f"| {out_features} x {columns} | {tokens} | {base:.1f} | {cells} |"


def semi_structured_times() -> Iterator[str]:
    """Rows of the table of PyTorch's semi-structured layers."""
    backend = working_backend(torch.bfloat16)
    for out_features, columns in TIMED_SHAPES:
        dense = torch.randn(out_features, columns, device="cuda").bfloat16()
        dense *= keep_largest(dense.abs(), 2)
        weights = {"F.linear": [dense.clone() for _ in range(4)]}
        weights["2:4"] = [semi_structured(dense, backend) for _ in range(4)]
        for tokens in SEMI_STRUCTURED_TOKENS:
            x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
            error = relative_error(F.linear(x, weights["2:4"][0]), F.linear(x, dense))
            graphs, how = {}, "CUDA graph"
            for name, copies in weights.items():
                try:
                    graphs[name] = graph(lambda i, x=x, copies=copies: F.linear(x, copies[i]), 4)
                except RuntimeError as failed:
                    how = f"eager; graph: {str(failed).splitlines()[0][:80]}"
                    torch.cuda.synchronize()
            if len(graphs) < 2:
                graphs = {name: Eager(x, copies) for name, copies in weights.items()}
            found = time_alternately(graphs, 4)
            base, sparse = found["F.linear"], found["2:4"]
            ratio = f"{sparse:.1f} ({base / sparse:.2f}x)"
            yield f"| {out_features} x {columns} | {tokens} | {base:.1f} | {ratio} | {error:.1e} | {backend} | {how} |"


@dataclass(frozen=True)
class Eager:
    """Replays a linear layer with each of `weights`, called from Python."""

    x: torch.Tensor
    weights: list[torch.Tensor]

    def replay(self) -> None:
        for weight in self.weights:
            F.linear(self.x, weight)


def lines() -> Iterator[str | bool]:
    """The report line by line, then whether every error was within its tolerance."""
    yield "Largest relative RMS error against the reference, at M = 1 (or 2), up to 16, 17, and of dx:"
    yield ""
    yield "| out x in | form | dtype | M = 1 | M <= 16 | M = 17 | dx | |"
    yield "|---|---|---|---|---|---|---|---|"
    passed = True
    for row, good in errors():
        yield row
        passed &= good
    yield ""
    yield "Microseconds per call (and times faster than bf16 `F.linear`), bf16 activations, CUDA graphs, median of 15:"
    yield ""
    yield f"| out x in | M | F.linear | {' | '.join(form.name for form in TIMED_FORMS)} |"
    yield "|---|---|---|" + "---|" * len(TIMED_FORMS)
    yield from times()
    yield ""
    yield "PyTorch's 2:4 layers (`to_semi_structured`), microseconds per call, median of 15:"
    yield ""
    yield "| out x in | M | F.linear | 2:4 | error | backend | measured by |"
    yield "|---|---|---|---|---|---|---|"
    yield from semi_structured_times()
    yield passed
