"""All kernels of all cases, built once a session and kept between sessions by content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4c.runtime.kernels import Kernels
from dsv4c.schedules._schedule import Choice, Schedule, Transforms
from dsv4c.schedules.emit import emit
from dsv4c.schedules.select import SCHEDULES, choose

from .cases import CASES, Case, make_case


def accepting(case: Case) -> list[Schedule]:
    known = [s for s in SCHEDULES if s.op in (case.node.op, "*") and "cpu" in s.targets]
    return [s for s in known if s.accepts(case.node) is None]


BESIDE = {"rms_norm", "rope"}  # ops whose Inductor kernel is tested although another one wins


def pairs() -> list[tuple[str, str]]:
    """Case and schedule, for all that accept. An Inductor kernel takes 2 s to build, so not every one it could make."""
    out = []
    for name in CASES:
        schedules = accepting(make_case(name, 9))
        for schedule in schedules:
            if schedule.op != "*" or len(schedules) == 1 or name in BESIDE:
                out.append((name, schedule.name))
    return out


PAIRS = pairs()


def choice_of(case: Case, schedule_name: str) -> Choice:
    schedule = next(s for s in SCHEDULES if s.name == schedule_name)
    return choose(schedule, case.node, "cpu", dict.fromkeys("TSREPQNMZ", 64), "a test")


def lay_out(tensor: Tensor, transforms: Transforms) -> Tensor:
    for name, *args in transforms:
        if name in ("cast", "narrow"):
            tensor = tensor.to(getattr(torch, args[0]))
        elif name == "reshape":
            tensor = tensor.reshape(args[0])
        else:
            tensor = tensor.transpose(-1, -2)
    return tensor.contiguous()


@dataclass
class Built:
    """Runs a schedule on the inputs of a case."""

    kernels: Kernels

    def run(self, case: Case, schedule: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, which start poisoned; what the op updates in place is updated in `inputs`."""
        choice = choice_of(case, schedule)
        sizes: dict[str, int] = {}
        for value, tensor in zip(case.node.inputs, inputs, strict=True):
            assert value is not None
            sizes.update({s: n for s, n in zip(value.shape, tensor.shape, strict=True) if isinstance(s, str)})
        args = [lay_out(t, choice.layouts[i]) if i in choice.layouts else t for i, t in enumerate(inputs)]
        outputs = []
        for value in (*choice.workspace, *case.node.outputs):
            dtype = getattr(torch, value.dtype)
            poison = float("nan") if dtype.is_floating_point else -7777
            outputs.append(torch.full(value.sizes(sizes), poison, dtype=dtype))
        for run in self.kernels.bind([(choice.kernel, [*args, *outputs])]):
            run()
        return outputs[len(choice.workspace) :]


def build(pairs: Sequence[tuple[str, str]], out: Path, cache: Path) -> Built:
    choices = [choice_of(make_case(name, 9), schedule) for name, schedule in pairs]
    return Built(Kernels(emit({c.kernel: c for c in choices}, out, cache), out))


@pytest.fixture(scope="session")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(PAIRS, tmp_path_factory.mktemp("kernels"), Path(request.config.cache.mkdir("kernels")))
