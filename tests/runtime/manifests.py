"""Manifests of artifacts that are never emitted: programs, weights and pools as compiled, kernels without code."""

from __future__ import annotations

import dataclasses

from dsv4c import artifact
from dsv4c.compile import Options, kv_groups, lower, plan_artifact
from dsv4c.config import FLASH, Target
from dsv4c.schedules._schedule import Choice


def flash_manifest(layers: int, options: Options) -> artifact.Manifest:
    """The first layers of flash at full width for Hopper. It takes seconds a layer."""
    config = dataclasses.replace(FLASH, num_hidden_layers=layers, compress_ratios=(*FLASH.compress_ratios[:layers], 0))
    target = Target("sm_90a")
    program = lower(config, options, arch=target.arch)
    made = plan_artifact(program, target, options)
    groups, states = kv_groups(program, made.states)
    model = config.to_dict()
    return artifact.Manifest(
        artifact.FORMAT_VERSION, model, artifact.config_sha256(model), target.arch, target.arch, "bfloat16",
        options.max_context, config.vocab_size, {}, (), (), {k: _kernel(k, c) for k, c in made.choices.items()},
        made.programs, groups, states, tuple(made.weights.values()), embedded_weights=False,
    )  # fmt: skip


def _kernel(name: str, choice: Choice) -> artifact.Kernel:
    launches = tuple(
        artifact.Launch(f"kernels/{name}.{i}.cubin", "", name, (), (1,), 128, 0)
        for i in range(len(choice.build.launches))
    )
    kind = "gpu" if launches else "aten"
    return artifact.Kernel(
        name, kind, choice.node.op, choice.schedule, choice.reason, choice.tolerance, choice.build.source,
        launches=launches,
    )  # fmt: skip
