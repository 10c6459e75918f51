"""`dsv4c`, but that a Dynamo worker writes the token ids that it is given to the file named first, a list a line."""

from __future__ import annotations

import json
import sys
from typing import Any

from dsv4c import cli
from dsv4c.runtime.dynamo import serving

FILE, *ARGUMENTS = sys.argv[1:]
read = serving.read_request


def recorded(request: Any, *more: Any) -> Any:
    with open(FILE, "a") as file:
        file.write(json.dumps(request["token_ids"]) + "\n")
    return read(request, *more)


serving.read_request = recorded
sys.exit(cli.main(ARGUMENTS))
