"""A process that owns pools and a ledger, exported through NIXL: prints its description, then what was released."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch

from dsv4c.runtime.transfer.ledger import Ledger, row_words
from dsv4c.runtime.transfer.nixl import NixlBackend
from tests.runtime.transfer.nodes import layout

COLUMNS = (4, 4, 4, 4)
ROWS = 4


def sides(mib: int, fill: int) -> tuple[dict[str, torch.Tensor], Ledger, NixlBackend]:
    """Pools of so many MiB each, a ledger, and the backend over them."""
    of = layout()
    pools = {name: torch.full((mib << 20,), fill, dtype=torch.uint8) for name in of.pools}
    ledger = Ledger(np.zeros((ROWS, row_words(COLUMNS)), np.int64), COLUMNS)
    return pools, ledger, NixlBackend(of, pools, ledger)


def main() -> None:
    _, ledger, backend = sides(int(sys.argv[1]), 7)
    ledger.words[2] = np.arange(ledger.words.shape[1])
    print(json.dumps(backend.describe()), flush=True)
    while True:
        for released in backend.poll_released():
            print(json.dumps(released), flush=True)
        time.sleep(backend.released_poll_s)


if __name__ == "__main__":
    main()
