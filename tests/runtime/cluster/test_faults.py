"""Faults at random moments: no wrong token, no hang, no page and no lease left behind on any worker.

pytest tests/runtime/cluster/test_faults.py --fault-moments 20 --fault-table docs/runtime.md
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv4c.artifact import load_manifest
from dsv4c.runtime.cluster.address import Address
from tests.runtime.cluster.faults import FAULTS, Known, Report, Trial, elsewhere
from tests.runtime.cluster.live import PATIENCE_S, Cluster, alone, mixed, wait_for

NAMES = {"prefill-0", "prefill-1", "decode-0", "decode-1"}
RESTARTED = "router restarted"


@pytest.fixture(scope="module")
def known(nano_artifact: Path) -> Known:
    asked = mixed(60, 7, load_manifest(nano_artifact).vocab_size, most=40)
    found = alone(nano_artifact, asked)
    return [(prompt, params, tokens) for (prompt, params), tokens in zip(asked, found, strict=True)]


@pytest.fixture(scope="module")
def moments(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--fault-moments"))


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[str, Report]]:
    """What becomes of every fault; written where the command line says."""
    reports: dict[str, Report] = {}
    yield reports
    file = request.config.getoption("--fault-table")
    if file is not None:
        write_table(Path(file), reports)


@pytest.fixture(scope="module")
def cluster(nano_artifact: Path) -> Iterator[Cluster]:
    with Cluster(nano_artifact, 2, 2, silence_s=2.0, patience_s=50.0, options=("--lease-ttl", "0.2")) as started:
        yield started


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault(name: str, cluster: Cluster, known: Known, moments: int, table: dict[str, Report]) -> None:
    strike, _ = FAULTS[name]
    report = table[name] = Report()
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    trial = Trial(cluster, known, seed, stop_s=10.0 if moments >= 20 else 2.5)
    for _ in range(moments):
        trial.moment(strike, report)
    assert not report.failed, report.failed  # with others there, nothing need fail


def test_a_router_restarted(
    nano_artifact: Path, known: Known, moments: int, table: dict[str, Report], tmp_path: Path
) -> None:
    """Workers of a router that ends drop all they have, and serve the next one."""
    report = table[RESTARTED] = Report()
    address = Address(name=str(tmp_path / "router.sock"))
    secret = "0123456789abcdef0123"
    cluster = Cluster(nano_artifact, 0, 0, address=address, secret=secret)
    workers = elsewhere(cluster, nano_artifact, tmp_path, ["prefill-0", "decode-0"])
    try:
        for _ in range(moments + 1):
            with cluster:
                cluster.await_members({"prefill-0", "decode-0"})
                cluster.check_clean()  # nothing of the last router's is left
                trial = Trial(cluster, known, random.randrange(2**32), stop_s=0)
                if report.moments == moments:
                    trial.moment(lambda *_: None, report)
                    break
                batch = [trial.draw.choice(known) for _ in range(8)]
                asked = [cluster.send(prompt, params) for prompt, params, _ in batch]
                trial.wait()
                for member in list(cluster.router.members):
                    member.wire.close()  # as a router that is killed: it says nothing
            for one, (_, _, tokens) in zip(asked, batch, strict=True):
                assert one.over.wait(PATIENCE_S)
                trial.judge(one, tokens, report)
            report.moments += 1
            cluster = Cluster(nano_artifact, 0, 0, address=address, secret=secret)
        assert all(worker.poll() is None for worker in workers)
    finally:
        for worker in workers:
            worker.terminate()
        codes = [worker.wait(PATIENCE_S) for worker in workers]
    assert codes == [0, 0]
    wait_for(lambda: not cluster.router.members, "workers to leave")


def write_table(file: Path, reports: dict[str, Report]) -> None:
    """Puts the table between its marks."""
    begin, end = "<!-- faults: begin -->", "<!-- faults: end -->"
    means = {name: text for name, (_, text) in FAULTS.items()}
    means[RESTARTED] = "its clients get an error; workers drop all and join the next"
    rows = [
        "| fault | moments | requests | errors | new attempts | recomputed | longest batch | what happens |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(report.row(name, means[name]) for name, report in reports.items()),
    ]
    text = file.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    file.write_text(f"{before}{begin}\n" + "\n".join(rows) + f"\n{end}{after}", encoding="utf-8")
