"""Whether the kernel compilers at hand know a target's instructions: asked before anything is built.

Older ones do not fail on every kernel: a Triton that lacks an instruction widens block-scaled operands and multiplies
them in BF16, so an artifact would be complete, and not what it says. An assembler that lacks the architecture fails on
the first kernel, with nothing that names the cause.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dsv4c.errors import ScheduleError
from dsv4c.schedules._gpu import ptxas_path

LEAST_TRITON: Mapping[str, tuple[int, int]] = {"sm_90a": (3, 9), "sm_100a": (3, 9), "sm_103a": (3, 9)}
"""Of which the kernels' machine code was audited; its `tl.dot_scaled` becomes `tcgen05.mma kind::mxf4nvf4` there."""
_INSTALL = "install the extra `gpu`, which states the versions"


@dataclass(frozen=True)
class Toolchain:
    """Triton's version and the architectures that the assembler knows (`sm_103a`), with the assembler's path."""

    triton: str
    assembler: Path
    architectures: frozenset[str]

    @classmethod
    def found(cls, arch: str) -> Toolchain:
        """What kernels for `arch` are built with here. Raises ScheduleError if Triton or the assembler is not there."""
        try:
            triton = version("triton")
        except PackageNotFoundError as error:
            raise ScheduleError(f"target `{arch}` needs Triton, which is not installed", hint=_INSTALL) from error
        assembler = ptxas_path(arch)
        try:
            text = subprocess.run([str(assembler), "--help"], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise ScheduleError(f"cannot run the assembler `{assembler}`: {error}", hint=_INSTALL) from error
        return cls(triton, assembler, frozenset(re.findall(r"'(sm_\w+)'", text)))

    def check(self, arch: str) -> None:
        """Raises ScheduleError, naming the tool, if it cannot build for `arch`."""
        numbers = tuple(int(part) for part in re.findall(r"\d+", self.triton)[:2])
        if numbers < (least := LEAST_TRITON[arch]):
            raise ScheduleError(
                f"Triton {self.triton} lacks instructions of target `{arch}`, which needs {least[0]}.{least[1]}",
                hint=_INSTALL,
            )
        if arch not in self.architectures:
            known = ", ".join(sorted(name for name in self.architectures if name.endswith("a"))) or "none"
            raise ScheduleError(
                f"the assembler `{self.assembler}` lacks target `{arch}`, it knows {known}",
                hint="take ptxas of a newer CUDA from PATH, or Triton's own by leaving it out of PATH",
            )


def check_toolchain(arch: str) -> None:
    """Raises ScheduleError if the tools installed here cannot build for the GPU architecture `arch`."""
    Toolchain.found(arch).check(arch)
