"""Compiles the bundled nano model for this CPU and completes a prompt in-process, without a server.

usage: python examples/generate.py ["PROMPT"]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from dsv4c.checkpoint.reader import Checkpoint
from dsv4c.compile import Options, compile_artifact
from dsv4c.config import Target
from dsv4c.launch import LaunchOptions, answer, launch

NANO = Path(__file__).resolve().parent / "nano"


def main(argv: list[str]) -> int:
    prompt = argv[0] if argv else "The package provides"
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "nano-cpu"
        compile_artifact(Checkpoint(NANO).config, Target("cpu"), artifact, Options(), checkpoint=NANO)
        launched = launch(artifact, LaunchOptions())
        print(prompt, end="")
        for text in answer(launched, prompt, max_tokens=48, temperature=0.0, seed=0):
            print(text, end="", flush=True)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
