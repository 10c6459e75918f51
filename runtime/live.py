"""The live part of a padded step: how many rows of each size are real, and tensors cut down to them.

A GPU program runs at the sizes of its bucket. A step's tokens come first, then padding of slot 0; entries that windows
complete (or may, where a span floats) come first, then ends of -1; edits and masks are those that a row of logits
names. For checks and references, which look at the values: the launched kernels never need the counts.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dsv4c.artifact import Program, Shape


def live_sizes(program: Program, values: Mapping[str, Tensor]) -> dict[str, int]:
    """Symbol -> live rows, for every size that the program pads. Reads the step's inputs: waits for the device.

    A step of nobody has one live token, of slot 0, so that nothing is empty that never is in a real step.
    """
    out: dict[str, int] = {}
    if program.phase == "mixed":
        return out
    for item in program.inputs:
        size = str(item.shape[0])
        if item.kind == "request_rows":
            out[size] = max(1, int((values[item.name] != 0).sum()))
        elif item.kind == "window_ends":
            out[size] = int((values[item.name] != -1).sum())
        elif item.kind == "edit_stops":
            edits = next(i for i in program.inputs if i.kind == "edit_tokens")
            out[str(edits.shape[0])] = int(values[item.name].max())
        elif item.kind == "mask_rows":
            masks = next(i for i in program.inputs if i.kind == "masks")
            out[str(masks.shape[0])] = 1 + int(values[item.name].max())
        elif item.kind == "draft_seats":
            out[size] = max(1, int((values[item.name] != 0).sum()))
    for name, rows in program.symbols.items():  # of the streams of each row
        base = name.removesuffix("_streams")
        if base != name and base in out:
            out[name] = out[base] * (rows // program.symbols[base])
    return out


def live_part(tensor: Tensor, shape: Shape, live: Mapping[str, int]) -> Tensor:
    """A view of the live part of a tensor of this declared shape."""
    for dim, size in enumerate(shape):
        if isinstance(size, str) and size in live:
            tensor = tensor.narrow(dim, 0, live[size])
    return tensor


def declared_shapes(program: Program) -> dict[str, Shape]:
    """Buffer or input -> its shape as the manifest says it."""
    return {b.name: b.shape for b in program.buffers} | {i.name: i.shape for i in program.inputs}
