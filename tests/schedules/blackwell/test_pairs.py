"""FP8 linear maps in clusters of two blocks: their numbers on an emulated cluster, their machine code as promised."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tilelang", reason="TileLang is not installed; see the extra `gpu`")

from dsv4c.artifact import Launch
from dsv4c.schedules import audit
from dsv4c.schedules._packing import mismatches
from dsv4c.schedules._tilelang import compile_tile
from tests.schedules.blackwell.emulate_pairs import Emulated, case, launch, values, wrong


def test_numbers_and_waits_on_an_emulated_cluster() -> None:
    kernel = Emulated(512, 1024, clusters=2, beside=2, stages=3, slots=1)
    for seed, tokens in enumerate((1, 129, 300)):
        tensors = case(tokens, 512, 1024, seed)
        assert wrong(kernel(*tensors, seed=seed), *tensors) == 0


@pytest.mark.parametrize("arch", ["sm_100a", "sm_103a"])
def test_machine_code(arch: str, tmp_path: Path) -> None:
    made = compile_tile(launch(4096, 4096, 74, 8, 6, 2), values(4096, 4096), arch, tmp_path)
    code, record = audit.read(made.image), made.record
    assert isinstance(record, Launch) and record.cluster == (2, 1, 1) and record.threads == 256
    assert code.target == arch and dict(code.matrix) == {"UTCQMMA": 8} and code.local == 0 and code.columns == 256
    assert mismatches(record.args, code.cubin) == []
    text = audit._disassembled(made.image)
    assert text.count("UTCQMMA.2CTA") == 8 and text.count("UTCCP") == text.count("UTCCP.T.S.2CTA") > 0
