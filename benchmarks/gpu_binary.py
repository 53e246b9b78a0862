"""The binary part of gpu_check.py: errors and times of the sign and binary operators, beside the ternary one."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gpu_timing import ROTATED_BYTES, TOLERANCE, graph, relative_error, time_alternately

from optimum_slim._kernels import (
    binary_linear,
    binary_linear_dx,
    binary_linear_dx_reference,
    binary_linear_reference,
    pack_signs,
    pack_ternary,
    sign_linear,
    sign_linear_dx,
    sign_linear_dx_reference,
    sign_linear_reference,
    ternary_linear,
)


TIMED_SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
TIMED_TOKENS = (1, 4, 16, 128)
CHECKED_SHAPES = ((4096, 4096), (130, 300))
CHECKED_TOKENS = (1, 9, 17)
CALLS = 64
"""Products in a CUDA graph; the weights rotate through more memory than the L2 cache holds."""


def random_signs(*shape: int) -> torch.Tensor:
    return pack_signs(torch.rand(shape, device="cuda") < 0.5)


@dataclass(frozen=True)
class Signs:
    """A sign layer with a number for every input and output, and activations of `bits`."""

    name: str
    bits: int
    operators = sign_linear, sign_linear_reference, sign_linear_dx, sign_linear_dx_reference

    def layer(self, outs: int, columns: int) -> tuple:
        scale_in = torch.randn(columns, device="cuda").half()
        return random_signs(outs, columns), scale_in, torch.rand(outs, device="cuda").half() + 0.1

    def numbers(self, columns: int) -> tuple[tuple, tuple]:
        """What follows the layer's tensors and bias in a call, and what follows the tensors for dx."""
        return (self.bits,), (columns,)


@dataclass(frozen=True)
class Binary:
    """A binary layer, a tenth of its columns salient."""

    name: str
    group_size: int
    offset: bool = False
    columns: bool = False
    operators = binary_linear, binary_linear_reference, binary_linear_dx, binary_linear_dx_reference

    def layer(self, outs: int, columns: int) -> tuple:
        groups = -(-columns // self.group_size)
        weight = random_signs(outs, 2, columns)
        salient = pack_signs(torch.rand(columns, device="cuda") < 0.1)
        scale = torch.rand(outs, groups, 4, device="cuda").half() + 0.1
        offset = torch.randn(outs, groups, 3, device="cuda").half() * 0.2 if self.offset else None
        factors = torch.rand(2, columns, device="cuda").half() + 0.5 if self.columns else None
        return weight, salient, scale, offset, factors

    def numbers(self, columns: int) -> tuple[tuple, tuple]:
        return (self.group_size,), (columns, self.group_size)


SIGNS, SIGNS_INT8 = Signs("1 bit, W1A16", 0), Signs("1 bit, W1A8", 8)
PLAIN, OFFSET = Binary("2 bits", 128), Binary("2 bits, offset", 128, offset=True)
COLUMNS = Binary("2 bits, columns", 128, columns=True)
TIMED_FORMS = (SIGNS, SIGNS_INT8, PLAIN, OFFSET, COLUMNS)
CHECKED_FORMS = (
    *TIMED_FORMS,
    Binary("2 bits, columns and offset", 256, True, True),
    Binary("2 bits, groups of 40", 40),
)


def errors() -> Iterator[tuple[str, bool]]:
    """Rows of the table of errors, and whether each is within its tolerance."""
    for outs, columns in CHECKED_SHAPES:
        for form in CHECKED_FORMS:
            linear, linear_reference, dx, dx_reference = form.operators
            layer = form.layer(outs, columns)
            after, after_dx = form.numbers(columns)
            for dtype, tolerance in TOLERANCE.items():
                found = []
                bias = torch.randn(outs, device="cuda", dtype=dtype)
                for tokens in CHECKED_TOKENS:
                    arguments = (torch.randn(tokens, columns, device="cuda", dtype=dtype), *layer, bias, *after)
                    found.append(relative_error(linear(*arguments), linear_reference(*arguments)))
                arguments = (torch.randn(9, outs, device="cuda", dtype=dtype), *layer, *after_dx)
                found.append(relative_error(dx(*arguments), dx_reference(*arguments)))
                good = all(error <= tolerance for error in found)
                cells = " | ".join(f"{error:.1e}" for error in found)
                name = str(dtype).removeprefix("torch.")
                yield f"| {outs} x {columns} | {form.name} | {name} | {cells} | {'ok' if good else 'FAIL'} |", good


def rotated(tensors: tuple) -> list[tuple]:
    """Copies of a layer that fill `ROTATED_BYTES`."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
    copies = min(CALLS, max(2, ROTATED_BYTES // size))
    return [tuple(None if tensor is None else tensor.clone() for tensor in tensors) for _ in range(copies)]


def ternary_layer(outs: int, columns: int) -> tuple:
    codes = torch.randint(-1, 2, (outs, columns), dtype=torch.int8, device="cuda")
    return pack_ternary(codes), torch.rand(outs, -(-columns // 128), device="cuda") + 0.1, None


def times() -> Iterator[str]:
    """Rows of the table of times."""
    for outs, columns in TIMED_SHAPES:
        dense = rotated((torch.randn(outs, columns, device="cuda").bfloat16(),))
        ternary = rotated(ternary_layer(outs, columns))
        layers = {form: rotated(form.layer(outs, columns)) for form in TIMED_FORMS}
        for tokens in TIMED_TOKENS:
            x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)

            def linear(i, x=x, dense=dense):
                return F.linear(x, *dense[i % len(dense)])

            def ternary_call(i, x=x, ternary=ternary, outs=outs):
                return ternary_linear(x, *ternary[i % len(ternary)], None, outs, 128, 0)

            graphs = {"F.linear": graph(linear, CALLS), "ternary": graph(ternary_call, CALLS)}
            for form, copies in layers.items():

                def call(i, x=x, form=form, copies=copies):
                    after, _ = form.numbers(x.shape[1])
                    return form.operators[0](x, *copies[i % len(copies)], None, *after)

                graphs[form.name] = graph(call, CALLS)
            found = time_alternately(graphs, CALLS)
            base = found.pop("F.linear")
            cells = " | ".join(f"{time:.1f} ({base / time:.2f}x)" for time in found.values())
            yield f"| {outs} x {columns} | {tokens} | {base:.1f} | {cells} |"


def lines() -> Iterator[str | bool]:
    """The report line by line, then whether every error was within its tolerance."""
    yield f"Relative RMS error against the reference, at M = {', '.join(map(str, CHECKED_TOKENS))}, and of dx:"
    yield ""
    yield f"| out x in | form | dtype | {' | '.join(f'M = {tokens}' for tokens in CHECKED_TOKENS)} | dx | |"
    yield "|---|---|---|" + "---|" * (len(CHECKED_TOKENS) + 2)
    passed = True
    for row, good in errors():
        yield row
        passed &= good
    yield ""
    yield "Microseconds per call (and times faster than bf16 `F.linear`), bf16 activations, CUDA graphs, median of 15;"
    yield "ternary is W2A16 in groups of 128:"
    yield ""
    yield f"| out x in | M | F.linear | ternary | {' | '.join(form.name for form in TIMED_FORMS)} |"
    yield "|---|---|---|---|" + "---|" * len(TIMED_FORMS)
    yield from times()
    yield passed
