"""The artifact: a directory that a compiler wrote and a runtime serves. The one file both sides read.

    DIR/manifest.json        everything below, as JSON; an unknown key is an error
    DIR/kernels/<sha>.<ext>  compiled code, named by its SHA-256
    DIR/weights/             optional: the checkpoint's safetensors files; else given when serving
    DIR/tokenizer/           optional: tokenizer.json and the chat settings
    DIR/ir/                  the program before and after each pass, for people

Names in a program (inputs, states, weights, buffers) share one namespace. A shape is a tuple of sizes; a size is
an int or the name of a symbol (`"T"` tokens, `"R"` requests, ...) whose largest value `Program.symbols` gives.
No pickle, no Python callables: JSON, safetensors and binaries only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dsv4c.errors import ArtifactError
from dsv4c.strictjson import decode_object

FORMAT_VERSION = 5

Size = int | str
Shape = tuple[Size, ...]


@dataclass(frozen=True)
class Pool:
    """One tensor of decoding state: `entry_shape` channels for every entry (KV) or request slot (state)."""

    name: str
    entry_shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class KVGroup:
    """Pools that share page tables. Page 0 is the null page: writes of padding land there, nobody reads it.

    An entry stands for `tokens_per_entry` tokens and a page for `page_tokens`; the pools have
    `num_pages * entries_per_page` rows. A token reads the last `horizon` tokens, itself included (None: all); a page
    that the next token reads nothing of may be freed, and its place in the page table then holds 0.
    """

    name: str
    tokens_per_entry: int
    page_tokens: int
    horizon: int | None
    pools: tuple[Pool, ...]

    @property
    def entries_per_page(self) -> int:
        return self.page_tokens // self.tokens_per_entry


@dataclass(frozen=True)
class StateGroup:
    """Pools with one row a request slot (compressor rings). Slot 0 is the null slot.

    After a multiple of `empty_every` tokens a row holds nothing that a later token reads (None: it always may).
    """

    name: str
    pools: tuple[Pool, ...]
    empty_every: int | None = None

    def empty_at(self, tokens: int) -> bool:
        """Whether a request can go on after `tokens` tokens without its row."""
        return self.empty_every is not None and tokens % self.empty_every == 0


# fmt: off
InputKind = Literal[
    "token_ids",  # [T] token of each row of the flat batch; the rows of a request are contiguous and ascending
    "positions",  # [T] position of that token in its request
    "request_rows",  # [T] row of its request in the per-request inputs
    "seq_starts",  # [R] tokens of the request already in its state before this step
    "seq_ends",  # [R] tokens in its state after this step
    "state_slots",  # [R] slot in the state groups
    "page_table",  # [R, P] pages of `group`; entry i holds the page of tokens [i * page_tokens, ...), 0 if absent
    "window_ends",  # [E] rows of T, ascending, whose position + 1 is a multiple of `ratio`
    "logit_rows",  # [S] rows of T whose logits are wanted
    # of programs that sample, for each row of logits [S]:
    "token_seats",  # slot where its token is left for the next step; 0: nobody's
    "temperature", "top_k", "top_p", "min_p",  # as SamplingParams
    "noise_keys", "noise_counters",  # the stream of its request, and how many tokens were drawn from it
    "penalty_seats", "repetition", "frequency", "presence",  # penalties; the slot of its counts, 0: none
    "edit_starts", "edit_stops", "edit_tokens", "edit_values",  # which edits are the row's; [M] token and addend
    "mask_rows", "masks",  # the row's mask, 0: none; [G, B] int32, a bit a token, 1: allowed. Masks' row 0 is not read
    # of programs that draft:
    "hidden",  # [T, ...] what the main model's step left of each row, or the draft step before; as its dtype says
    "next_ids",  # [T] the token that follows each row's, where no row of logits gives it
    "block_rows",  # [R] the row of T where a request's block begins: its last token, then placeholders
    # of programs that verify drafts; a token id -1 - i is then pending i of its slot (0: its last token, then drafts),
    # a position -1 - i is i behind the slot's length, as is a seq_starts of -1 and a seq_ends of -i; an end -2 - f is
    # the row that completes a window in the span that begins at row f, if one does. For each row of logits [S]:
    "chain",  # how many drafts of the same request lie before the row
    "noise_shifts",  # what the row's position lacks to the counter of its noise
    # and for each request that samples [D]:
    "draft_starts", "draft_limits", "draft_seats",  # its first row of logits, the drafts to verify behind it, its slot
    "draft_temperature", "draft_top_k", "draft_top_p", "draft_min_p", "draft_keys",  # as the rows' own
]
# fmt: on


@dataclass(frozen=True)
class Input:
    """One tensor the engine gives at every step. `min_columns`: least width of a page table."""

    name: str
    kind: InputKind
    shape: Shape
    group: str | None = None
    ratio: int | None = None
    min_columns: int = 1
    dtype: str = "int64"


@dataclass(frozen=True)
class Buffer:
    """A planned tensor: `offset` bytes into the arena, or a strided view of the buffer `of`.

    `strides` and `element_offset` count elements; the strides of an owning buffer are those of a dense tensor, and
    left empty if a size behind the first is a symbol.
    """

    name: str
    shape: Shape
    dtype: str
    strides: tuple[int, ...]
    offset: int | None = None
    of: str | None = None
    element_offset: int = 0


@dataclass(frozen=True)
class Wait:
    """A call waits for all of call number `call` of its program, before its own launch number `launch`."""

    call: int
    launch: int = 0


@dataclass(frozen=True)
class Call:
    """One kernel launch: `args` are value names or scalars, outputs last; `outputs` of them are written.

    Calls of different lanes may run at the same time, but for their waits. The order of calls is valid without lanes.
    """

    kernel: str
    args: tuple[str | int | float | bool | None, ...]
    outputs: int
    scope: str = ""
    """Where in the model it comes from, e.g. `L07.attn`."""
    lane: int = 0
    waits: tuple[Wait, ...] = ()
    """For earlier calls of other lanes; everything else that it needs comes before it anyway."""


@dataclass(frozen=True)
class IndexRange:
    """The integers of `value` are indices: `low` <= each < the product of the sizes `below`."""

    value: str
    low: int
    below: Shape


@dataclass(frozen=True)
class Contract:
    """What the calls of a segment may count on and what they promise, for a runtime that checks it.

    Sizes of these names in `padded` hold live rows with padding behind them: live rows depend on no padding, whatever
    bytes it holds. Every tensor has the shape and strides of its buffer; those that are not dense are listed.
    """

    padded: tuple[str, ...] = ()
    strides: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    ranges: tuple[IndexRange, ...] = ()


@dataclass(frozen=True)
class Segment:
    """A run of calls. `graph` segments can be captured; every other kind says why it cannot."""

    kind: Literal["graph", "eager", "host", "comm"]
    calls: tuple[Call, ...]
    why: str = ""
    contract: Contract = Contract()


@dataclass(frozen=True)
class Program:
    """One executable program: its symbols with their largest values, inputs, planned buffers and segments.

    Phase `mixed` (CPU) takes any sizes up to the symbols. `decode` and `prefill` (GPU) run at exactly these sizes, to
    be captured once: a step is padded with tokens of slot 0 at position 0, ends of -1 and logit rows of slot 0, and
    per-request inputs have a row for every slot, in place of one for every request of the step. They sample: a token
    id below 0 is the last token of its slot. A decode step has one token a request.

    Phase `draft` (CPU) is one pass of the drafter, of any sizes: it reads `hidden` and `next_ids` of rows that the main
    model has computed, or of what it drafted itself, and its logits are of the token after next. One that drafts whole
    blocks has two programs: the first takes in rows of `hidden` and gives nothing, the second gives `drafts`.
    """

    phase: Literal["mixed", "draft", "decode", "prefill"]
    symbols: dict[str, int]
    inputs: tuple[Input, ...]
    buffers: tuple[Buffer, ...]
    segments: tuple[Segment, ...]
    outputs: dict[str, str]
    """Meaning -> value name. `logits` is [S, vocab_size] float32, after edits. Programs that sample also have `tokens`
    int64 [S], -1 where the logits are no numbers, and `replaced` [M]: the logits that edits changed. `hidden` [T, ...]:
    what a drafter reads. Programs that verify drafts have `accepted` int64 [D]: the rows of each request that count.
    `drafts` int64 [R, B] and `confidences` float32 [R, B]: the tokens that may follow a block's first row, and how sure
    each one is if those before it are right, as the logit of a probability."""
    arena_bytes: int
    predicted_us: float = 0.0
    """What its calls should take one after the other, by measurement or roofline; 0 where sizes are not fixed."""

    @property
    def any_size(self) -> bool:
        """Whether it takes any sizes up to its symbols, and so is not captured."""
        return self.phase in ("mixed", "draft")


Expr = int | str
"""An integer: a number, or an expression over the sizes of a call's arguments (see runtime/gpu.py)."""


@dataclass(frozen=True)
class TensorMap:
    """How the copy engine sees an argument: its sizes and element strides, outermost first, and the tile it moves."""

    dtype: str
    sizes: tuple[Expr, ...]
    strides: tuple[Expr, ...]
    box: tuple[int, ...]
    swizzle: int
    """Bytes: 0, 32, 64 or 128."""
    fill: Literal["zero", "nan"] = "zero"
    promotion: int = 128
    """Bytes fetched into L2 at once: 0, 64, 128 or 256."""


@dataclass(frozen=True)
class LaunchArg:
    """One parameter of a GPU kernel, in order.

    `ptr` is the address of the call's argument `arg`, `map` a tensor map over it, `i32`, `i64` and `f32` a `value`,
    `null` a null pointer (a compiler's unused scratch).
    """

    kind: Literal["ptr", "map", "i32", "i64", "f32", "null"]
    arg: int | None = None
    value: int | float | str | None = None
    multiple: int = 1
    """The kernel assumes that this divides the value."""
    map: TensorMap | None = None


@dataclass(frozen=True)
class Launch:
    """One GPU kernel: where its code is, what it is given, and how many threads run it. Sizes in bytes."""

    file: str
    sha256: str
    symbol: str
    args: tuple[LaunchArg, ...]
    grid: tuple[Expr, ...]
    threads: int
    shared: int
    registers: int = 0
    cluster: tuple[int, ...] = (1, 1, 1)
    pdl: bool = False
    """Programmatic dependent launch: it may begin while the kernel before it drains."""


@dataclass(frozen=True)
class Kernel:
    """One compiled or vendor kernel, why it was chosen, and what it promises."""

    name: str
    kind: Literal["aoti", "cpp", "aten", "gpu"]
    op: str
    schedule: str
    reason: str
    tolerance: float
    """Largest error relative to the float32 reference, elementwise against the largest magnitude; 0 is exact."""
    symbol: str
    """Exported function (cpp), model name (aoti), vendor call (aten) or empty (gpu)."""
    file: str | None = None
    sha256: str | None = None
    attrs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of a vendor call."""
    op_attrs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of the logical op, as its reference takes them; kernels have them baked in."""
    launches: tuple[Launch, ...] = ()
    """Of a `gpu` kernel: run one after another on the call's arguments."""


@dataclass(frozen=True)
class Plain:
    """A weight before a kernel's layout: what the first `transforms` of its transforms make."""

    shape: tuple[int, ...]
    dtype: str
    transforms: int


@dataclass(frozen=True)
class Weight:
    """One runtime weight: checkpoint tensors and the transforms that lay them out (data, never code).

    `transforms` run left to right over the list of source tensors; each is a name and its arguments:
    ("dequantise",) every source with its `.scale` to float32, or ("stored",) its bytes as they are; ("stack",) along a
    new dim 0; ("concat", dim); ("cast", dtype); ("narrow", dtype), a cast that must lose no bit; ("view", dtype), the
    same bytes; the layouts and checks of runtime/layouts.py; ("values", [floats]), a constant that has no source.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[str, ...]
    transforms: tuple[tuple[Any, ...], ...]
    plain: Plain | None = None
    """As the logical op takes it, where a kernel's layout follows."""


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to a program."""

    name: str
    rewrites: int
    nodes_before: int
    nodes_after: int
    exact: bool
    why: str = ""
    tolerance: float = 0.0
    """Of an inexact pass, with the reason above: the largest error of a row that any call gives, on equal inputs."""


@dataclass(frozen=True)
class Drafter:
    """What guesses the next tokens, for the model to verify several in one step."""

    kind: Literal["mtp", "dspark"]
    max_tokens: int
    """Most drafts of a request in one step."""
    block_size: int | None = None
    """Of a drafter of whole blocks: tokens of one pass."""
    placeholder_id: int | None = None
    """Of a drafter of whole blocks: the token that stands for those not known yet."""


@dataclass(frozen=True)
class Manifest:
    """The whole artifact in words and numbers."""

    format_version: int
    model: dict[str, Any]
    """config.json of the model."""
    model_sha256: str
    target: str
    isa: str
    """Instruction set the kernels need: `avx512`, `avx2`, `default`, or a GPU architecture."""
    compute_dtype: str
    max_context: int
    vocab_size: int
    tools: dict[str, str]
    passes: tuple[PassRecord, ...]
    numerics: tuple[str, ...]
    """Everything that makes results differ from the plain float32 model, one sentence each."""
    kernels: dict[str, Kernel]
    programs: dict[str, Program]
    kv_groups: tuple[KVGroup, ...]
    state_groups: tuple[StateGroup, ...]
    weights: tuple[Weight, ...]
    embedded_weights: bool
    truncated_from: int | None = None
    """Layers of the model of which this one is the first few, made for measurement; None for a whole model."""
    drafter: Drafter | None = None
    """None: every step gives a request one token."""


def manifest_to_json(manifest: Manifest) -> str:
    """Canonical text: the same manifest gives the same bytes."""
    return json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def manifest_from_json(text: str) -> Manifest:
    """The manifest in this text. Raises ArtifactError that names the field at fault."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ArtifactError(f"manifest.json is not JSON: {error}", hint="compile the artifact again") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"artifact has format version {version!r}, this dsv4c reads {FORMAT_VERSION}",
            hint="compile it again with this version",
        )
    manifest: Manifest = decode_object(Manifest, data)
    return manifest


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def config_sha256(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config.json mapping in canonical form."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def save_manifest(manifest: Manifest, directory: Path) -> None:
    """Writes manifest.json; call it last, so that a directory with a manifest is whole."""
    (directory / "manifest.json").write_text(manifest_to_json(manifest), encoding="utf-8")


def load_manifest(directory: str | Path) -> Manifest:
    """Reads and validates DIR/manifest.json and the hash of every kernel file.

    Raises ArtifactError for a directory that is no artifact, another format version, an unknown or missing
    field, a kernel file that is absent or whose hash differs.
    """
    directory = Path(directory)
    path = directory / "manifest.json"
    if not path.is_file():
        raise ArtifactError(
            f"`{directory}` is not an artifact: it has no manifest.json", hint="make one with `dsv4c compile`"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"cannot read `{path}`: {error}", hint="compile the artifact again") from error
    manifest = manifest_from_json(text)
    found = config_sha256(manifest.model)
    if found != manifest.model_sha256:
        raise ArtifactError(
            f"manifest: `model` hashes to {found[:12]}, `model_sha256` says {manifest.model_sha256[:12]}",
            hint="the manifest was edited; compile the artifact again",
        )
    for name, expected in kernel_files(manifest.kernels.values()).items():
        file = directory / name
        if not file.is_file():
            raise ArtifactError(f"kernel file `{name}` is absent", hint="compile the artifact again")
        found = sha256_of(file)
        if found != expected:
            raise ArtifactError(
                f"kernel file `{name}` hashes to {found[:12]}, the manifest says {expected[:12]}",
                hint="the file is corrupted; compile the artifact again",
            )
    return manifest


def kernel_files(kernels: Iterable[Kernel]) -> dict[str, str]:
    """File -> SHA-256 of all compiled code that these kernels name."""
    out = {}
    for kernel in kernels:
        if kernel.file is not None:
            out[kernel.file] = str(kernel.sha256)
        out.update({launch.file: launch.sha256 for launch in kernel.launches})
    return out
