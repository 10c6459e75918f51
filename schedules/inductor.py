"""Any elementwise or reducing op through Inductor: its reference is exported, Inductor writes the C++, we compile it.

The exported function stores its results into given outputs, so the store fuses with the arithmetic. Of AOTInductor's
generated text only the kernels and `run_impl` are kept, over the small host interface of cpp/inductor.h: the kernel
then joins the artifact's one library (24 KB and 1.2 s, where a whole AOTInductor container is 1.4 MB and 5 s). A
text that needs more than that interface, such as a GEMM, does not compile, and the op is named.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dsv4c.errors import ScheduleError
from dsv4c.ops import OPS
from dsv4c.schedules._cpp import CPU, moved
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Value, Work

_OWN_KERNELS = {
    "attend_window": "it would materialise every key of every token",
    "attend_csa": "it would materialise every key of every token",
    "attend_hca": "it would materialise every key of every token",
    "attend_block": "it would materialise every key of every token",
    "markov_draft": "its products need a library call",
    "index_topk": "it would materialise the score of every entry",
    "experts": "it would gather the weights of every token",
    "gate_bias": "it sorts",
    **dict.fromkeys(("linear", "grouped_linear"), "a GEMM needs a library call"),
    **dict.fromkeys(("hc_pre", "hc_pre_norm", "hc_post_pre_norm"), "its projection needs a library call"),
    **dict.fromkeys(("hc_head", "hc_head_norm", "hc_post"), "its projection needs a library call"),
}
EXAMPLE_ROWS = 509  # a size that no channel count equals: symbols must not merge with it


def _accepts(node: OpNode) -> str | None:
    if node.mutates:
        return "it updates tensors in place"
    return _OWN_KERNELS.get(node.op)


def _signature(value: Value | None) -> Any:
    return None if value is None else [list(value.shape), value.dtype, list(value.strides or ())]


def _build(node: OpNode, config: Config) -> Build:
    tensors = [[_signature(v) for v in node.inputs], [_signature(v) for v in node.outputs]]
    return Build("inductor", node.op, {}, (json.dumps(dict(node.attrs), sort_keys=True), json.dumps(tensors)))


# Times the bytes of inputs and outputs, measured against the roofline of a plain copy (EPYC, 512 rows of nano):
# SwiGLU 1.0, RMSNorm 1.2; interleaved pairs do not vectorise: RoPE 7
_PASSES = {"rope": 7.0, "head_norm_rope": 7.0, "split_heads_rope": 7.0}


def _cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    return Work(_PASSES.get(node.op, 1.2) * moved((*node.inputs, *node.outputs), symbols))


SCHEDULES = (Schedule("any.inductor", "*", CPU, _build, _cost, _accepts, tolerance=5e-6),)


def symbols_of(nodes: Iterable[Value | None]) -> list[str]:
    """The symbols of these shapes, in order of appearance."""
    found: dict[str, None] = {}
    for value in nodes:
        for size in value.shape if value else ():
            if isinstance(size, str):
                found[size] = None
    return list(found)


def generate(node: OpNode, cache: Path) -> str:
    """C++ text of the op's kernel, without includes of ours; from `cache` if it was generated before."""
    signature = _build(node, {}).signature
    key = [torch.__version__, torch.backends.cpu.get_cpu_capability(), _own_text(), node.op, *signature]
    file = cache / f"inductor-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.cc"
    if not file.exists():
        text = _cut(_generate(node), node)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    return file.read_text(encoding="utf-8")


def _own_text() -> str:
    """Of this file: what it asks of Inductor decides what Inductor writes."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _example(value: Value, sizes: Mapping[str, int]) -> torch.Tensor:
    shape = value.sizes(sizes)
    dtype = getattr(torch, value.dtype)
    if value.strides is None:
        return torch.zeros(shape, dtype=dtype)
    return torch.zeros(shape[0], value.strides[0], dtype=dtype).as_strided(shape, value.strides)


class _Stores(torch.nn.Module):
    """The op's reference with its results stored into the tensors given last."""

    def __init__(self, node: OpNode) -> None:
        super().__init__()
        self.node = node

    def forward(self, *tensors: torch.Tensor) -> tuple[()]:
        count = len(tensors) - len(self.node.outputs)
        given = iter(tensors[:count])
        args = [None if v is None else next(given) for v in self.node.inputs]
        results = OPS[self.node.op].reference(*args, **self.node.attrs)
        results = results if isinstance(results, tuple) else (results,)
        for to, result in zip(tensors[count:], results, strict=True):
            to.copy_(result)
        return ()


def _generate(node: OpNode) -> str:
    import torch._inductor  # the compiler is slow to import, and a warm cache does not need it

    values = [v for v in (*node.inputs, *node.outputs) if v is not None]
    names = symbols_of(values)
    sizes = {name: EXAMPLE_ROWS + 2 * i for i, name in enumerate(names)}
    dims = {name: torch.export.Dim(name, min=0, max=1 << 30) for name in names}
    dynamic = tuple({i: dims[s] for i, s in enumerate(v.shape) if isinstance(s, str)} or None for v in values)
    examples = tuple(_example(v, sizes) for v in values)
    options = {
        "aot_inductor.package": True,
        "aot_inductor.package_cpp_only": True,
        "aot_inductor.model_name_for_generated_files": "kernel",
        "cpp.dynamic_threads": True,
        "force_pointwise_cat": True,  # else a concatenation is made apart and then copied into the output
        "cpp.vec_isa_ok": True,  # asked of torch, not probed by compiling
    }
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*treespec, LeafSpec", FutureWarning)  # torch copying its own tree specs
        options["aot_inductor.output_path"] = str(Path(scratch) / "kernel")
        try:
            exported = torch.export.export(_Stores(node), examples, dynamic_shapes=(dynamic,), strict=False)
            files = torch._inductor.aot_compile(exported.module(check_guards=False), examples, options=options)
        except (RuntimeError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:
            raise ScheduleError(
                f"inductor cannot compile `{node.describe()}`: {str(error).splitlines()[0]}",
                hint="give the op a schedule of its own in schedules/",
            ) from error
        assert isinstance(files, list)
        source = next(str(f) for f in files if str(f).endswith("wrapper.cpp"))
        return Path(source).read_text(encoding="utf-8")


def _cut(text: str, node: OpNode) -> str:
    """Kernels and `run_impl` of a generated file, joined with our host interface."""
    start = text.find("void AOTInductorModel::run_impl(")
    end = text.find("} // AOTInductorModel::run_impl")
    kernels = text.find("#include <torch/csrc/inductor/cpp_prefix.h>")
    if min(start, end, kernels) < 0:
        raise ScheduleError(
            f"this torch's Inductor writes `{node.describe()}` in an unknown form", hint="use a supported torch"
        )
    count = sum(v is not None for v in (*node.inputs, *node.outputs))
    # A parallel region costs microseconds even where it has one row to do, and far more if a core is busy
    generated = (
        text[kernels:]
        .split("// Compile cmd")[0]
        .replace("#pragma omp parallel", "#pragma omp parallel if (dsv4c_parallel)")
    )
    generated = generated.replace('extern "C"', "static")
    return (
        "static thread_local bool dsv4c_parallel = false;\n"
        f'{generated}\n#include "inductor.h"\nnamespace {{\n{text[start:end]}}}\n}}\n'
        "DSV4C_KERNEL {\n"
        f"  Handle handles[{count}];\n"
        "  int64_t largest = 0;\n"
        "  int used = 0;\n"
        "  for (int i = 0; i < a.count; ++i) {\n"
        "    Tensor tensor = a[i];\n"
        "    if (!tensor) continue;\n"
        f'    if (used == {count}) throw std::runtime_error("too many arguments");\n'
        "    largest = std::max(largest, tensor.numel());\n"
        "    handles[used++].tensor = tensor.t;\n"
        "  }\n"
        "  dsv4c_parallel = largest > (1 << 15);\n"
        "  AOTInductorModel().run_impl(handles, nullptr, nullptr, nullptr);\n"
        "}\nDSV4C_END\n"
    )
