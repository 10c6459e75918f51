"""Trains the nano model on encoded text (see encode.py) for a given time, and writes float32 weights and the log.

    python examples/train_nano/train.py DATA OUT --seconds 500

DATA holds train.npy.xz or train.npy (uint16 tokens, documents between BOS and EOS). The schedule follows elapsed
time, not steps: a short warm-up, a constant rate, a linear decay, and weights rounded as stored for the last part.
OUT gets weights-0.safetensors .. weights-3.safetensors (float32 but for embedding and head, the plain model's
parameter names) and log.json.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from optimise import Muon, adam_factor, as_stored, as_trained, storage_kinds, uses_adam
from whole import Params, Result, Whole

from dsv4c.config import ModelConfig, preset
from dsv4c.model.transformer import Transformer


def load_tokens(data: Path, name: str) -> Tensor:
    packed = data / f"{name}.npy.xz"
    if packed.is_file():
        with lzma.open(packed) as file:
            return torch.from_numpy(np.load(file).astype(np.int32))
    return torch.from_numpy(np.load(data / f"{name}.npy").astype(np.int32))


def balanced_table(counts: Tensor, experts: int, k: int, generator: torch.Generator) -> Tensor:
    """Expert ids [V, k], distinct in a row: frequent tokens first, each to the experts with the least load so far."""
    load = torch.zeros(experts, dtype=torch.float64)
    table = torch.zeros(len(counts), k, dtype=torch.int64)
    for token in counts.argsort(descending=True).tolist():
        jitter = torch.rand(experts, generator=generator) * (load.max() * 0.01 + 1e-6)
        table[token] = (load + jitter).topk(k, largest=False).indices
        load[table[token]] += float(counts[token]) + 1e-3
    return table


@torch.no_grad()
def initialise(model: Transformer, config: ModelConfig, counts: Tensor, seed: int) -> None:
    """Small embeddings and outputs; hyper-connections near identity, each sublayer leaning on a stream of its own."""
    generator = torch.Generator().manual_seed(seed)
    n = config.hc_mult
    model.embed.weight.mul_(0.3)
    model.head.weight.mul_(0.3)
    for place, module in enumerate([*model.layers, *model.mtp]):
        for half, part in enumerate(("attn", "ffn")):
            base, stream = getattr(module, f"hc_{part}_base"), (2 * place + half) % n
            base[:n], base[stream] = -1.5, 1.5
            base[n : 2 * n], base[n + stream] = -0.3, 0.3
            base[2 * n :] = 3.0 * torch.eye(n).flatten()
            getattr(module, f"hc_{part}_scale").fill_(0.1)
        module.attn.wo_b.weight.mul_(0.4)
        module.ffn.experts.w2.mul_(0.4)
        module.ffn.shared_experts.w2.weight.mul_(0.4)
        if module.ffn.kind == "hash":
            table = balanced_table(counts, config.n_routed_experts, config.num_experts_per_tok, generator)
            module.ffn.gate.tid2eid.copy_(table)
    for head in (model, *model.mtp):
        head.hc_head_base.fill_(-1.1)  # sigmoid: a quarter of each stream
        head.hc_head_scale.fill_(0.1)


def losses(main_TD: Tensor, mtp_TD: Tensor, head: Tensor, next_BS: Tensor, after_BS: Tensor) -> tuple[Tensor, ...]:
    """Cross-entropy of the main model; of the MTP block against the text, and against the main model's distribution."""
    weight = head.to(main_TD.dtype)
    main = F.linear(main_TD, weight).float()
    drafts = F.linear(mtp_TD, weight).float()
    ce = F.cross_entropy(main, next_BS.flatten())
    hard = F.cross_entropy(drafts, after_BS.flatten())
    teacher = main.detach().unflatten(0, next_BS.shape)[:, 1:]
    student = drafts.unflatten(0, next_BS.shape)[:, :-1]
    soft = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1).mean()
    agree = (teacher.argmax(-1) == student.argmax(-1)).float().mean()
    return ce, hard, soft, agree


class Batches:
    """Windows of `length` + 2 tokens at a new offset every epoch, shuffled; infinite."""

    def __init__(self, tokens: Tensor, length: int, batch: int, seed: int) -> None:
        self.tokens, self.length, self.batch = tokens, length, batch
        self.generator = torch.Generator().manual_seed(seed)
        self.starts = torch.empty(0, dtype=torch.int64)
        self.epoch = 0

    def __call__(self) -> Tensor:
        while len(self.starts) < self.batch:
            first = int(torch.randint(self.length, (1,), generator=self.generator))
            starts = torch.arange(first, len(self.tokens) - self.length - 2, self.length)
            self.starts = torch.cat((self.starts, starts[torch.randperm(len(starts), generator=self.generator)]))
            self.epoch += 1
        now, self.starts = self.starts[: self.batch], self.starts[self.batch :]
        at = now.to(self.tokens.device).unsqueeze(1) + torch.arange(self.length + 2, device=self.tokens.device)
        return self.tokens[at].long()


class Guard:
    """Keeps two healthy states; a loss far above the recent ones brings the older back."""

    def __init__(self, params: list[Tensor], muon: Muon, adam: torch.optim.Optimizer) -> None:
        self.params, self.muon, self.adam = params, muon, adam
        self.states: list[list[Tensor]] = []
        self.losses: list[float] = []

    def _tensors(self) -> list[Tensor]:
        moments = [v for state in self.adam.state.values() for v in state.values() if isinstance(v, Tensor)]
        return [*self.params, *self.muon.buffers.values(), *moments]

    @torch.no_grad()
    def diverged(self, loss: float) -> bool:
        """Takes the mean loss of the last 20 steps; True if the state was set back."""
        recent = min(self.losses[-10:], default=float("inf"))
        if not loss < recent + 0.25:
            if not self.states:
                raise SystemExit(f"the loss is {loss} before any healthy state")
            for tensor, kept in zip(self._tensors(), self.states[0], strict=True):
                tensor.copy_(kept)
            self.losses = self.losses[-10:]
            return True
        self.losses.append(loss)
        if len(self.losses) % 10 == 0:
            self.states = [*self.states[-1:], [tensor.clone() for tensor in self._tensors()]]
        return False


def rate(progress: float, step: int) -> float:
    """Learning-rate factor: 200 steps up, constant to 35 % of the time, then linear down to 1 %."""
    return min(1.0, (step + 1) / 200) * (1.0 if progress < 0.35 else max(0.01, (1 - progress) / 0.65))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=500.0, help="training time after compilation")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32, help="sequences a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--mtp", type=float, default=0.3)
    parser.add_argument("--mtp-late", type=float, default=1.0, help="weight of the MTP losses once weights are rounded")
    parser.add_argument(
        "--rounded-from", type=float, default=0.8, help="progress at which weights are rounded as stored"
    )
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 32
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    config = preset("nano")
    tokens = load_tokens(args.data, "train")
    counts = torch.bincount(tokens, minlength=config.vocab_size)
    model = Transformer(config)
    initialise(model, config, counts, args.seed)
    model.to(device)
    print(f"{len(tokens) / 1e6:.2f} M tokens; {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; "
          f"ready after {time.perf_counter() - began:.1f} s", flush=True)  # fmt: skip
    params: Params = dict(model.named_parameters())
    tables = {name: value for name, value in model.named_buffers() if name.endswith("tid2eid")}
    biases = [model.layers[i].ffn.gate.bias if i < config.num_hidden_layers else model.mtp[0].ffn.gate.bias
              for i in range(len(config.compress_ratios)) if i >= config.num_hash_layers]  # fmt: skip
    for bias in biases:
        bias.requires_grad_(False)
    learnt = {name: p for name, p in params.items() if p.requires_grad}
    muon = Muon([p for name, p in learnt.items() if not uses_adam(name)])
    small = [p for name, p in learnt.items() if uses_adam(name)]
    by_factor: dict[float, list[Tensor]] = {}
    for name, p in learnt.items():
        if uses_adam(name):
            by_factor.setdefault(adam_factor(name), []).append(p)
    adam = torch.optim.AdamW(
        [{"params": ps, "scale": factor} for factor, ps in by_factor.items()],
        lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda",
    )  # fmt: skip
    kinds = storage_kinds(config)
    wrap: Any = (lambda f: f) if args.no_compile else (lambda f: torch.compile(f, dynamic=False))
    run, loss_of = Whole(config, args.length, device, wrap), wrap(losses)
    batches = Batches(tokens.to(device), args.length, args.batch, args.seed)

    log: list[dict[str, float]] = []
    sums = torch.zeros(5, device=device)
    start = step = 0
    clock = time.perf_counter()
    guard, caution = Guard([*learnt.values(), *biases], muon, adam), 1.0
    while True:
        if step == start + 3 and start == 0:
            if device.type == "cuda":
                torch.cuda.synchronize()
            print(f"compiled after {time.perf_counter() - began:.1f} s", flush=True)
            clock, start = time.perf_counter(), step
        progress = (time.perf_counter() - clock) / args.seconds if start else 0.0
        if progress >= 1 or step >= args.steps:
            break
        rounded = progress >= args.rounded_from
        ids = batches()
        used = as_stored(learnt, kinds) if rounded else as_trained(learnt)
        result: Result = run({**params, **used, **tables}, ids[:, :-2], ids[:, 1:-1], dtype)
        ce, hard, soft, agree = loss_of(
            result.main_TD, result.mtp_TD, used["head.weight"], ids[:, 1:-1].contiguous(), ids[:, 2:].contiguous()
        )
        weight = args.mtp_late if rounded else args.mtp
        (ce + weight * 0.5 * (hard + soft) + result.index_loss).backward()
        factor = rate(progress, step) * caution
        for group in adam.param_groups:
            group["lr"] = args.adam_lr * factor * group["scale"]
        torch.nn.utils.clip_grad_norm_(small, 1.0)
        adam.step()
        muon.step(args.lr * factor)
        for p in learnt.values():
            p.grad = None
        loads = torch.stack(result.loads[config.num_hash_layers :]).float()
        for bias, load in zip(biases, loads, strict=True):
            bias.add_(torch.sign(load.mean() - load), alpha=1e-3 * factor)
        sums += torch.stack((ce.detach(), hard.detach(), soft.detach(), result.index_loss.detach(), agree))
        step += 1
        if step % 20 == 0:
            ce_, hard_, soft_, index_, agree_ = (sums / 20).tolist()
            sums.zero_()
            worst = float((loads.amax(1) / loads.mean(1)).max())
            seconds = time.perf_counter() - clock
            log.append({"step": step, "tokens": step * args.batch * args.length, "seconds": seconds, "loss": ce_,
                        "mtp": hard_, "mtp_soft": soft_, "index": index_, "agree": agree_, "imbalance": worst,
                        "rate": factor, "rounded": rounded, "epoch": batches.epoch})  # fmt: skip
            if step % 100 == 0 or step <= 60:
                speed = (step - start) * args.batch * args.length / max(seconds, 1e-9) / 1e6
                print(f"{step:6} {seconds:6.1f} s {speed:5.2f} M tok/s  loss {ce_:.4f}  mtp {hard_:.4f} / {soft_:.4f}  "
                      f"agree {agree_:.3f}  index {index_:.4f}  imbalance {worst:.2f}  epoch {batches.epoch}"
                      f"{'  rounded' if rounded else ''}", flush=True)  # fmt: skip
            if guard.diverged(ce_):
                caution *= 0.7
                print(f"{step:6} loss {ce_:.4f}: back to an earlier state, rate x {caution:.2f}", flush=True)
    save(args.out, {**params, **tables}, {"log": log, "arguments": {k: str(v) for k, v in vars(args).items()},
         "seconds": time.perf_counter() - began, "steps": step, "train_tokens": len(tokens)})  # fmt: skip


def save(out: Path, tensors: Params, facts: dict[str, Any]) -> None:
    """Four files of about equal size, and the log."""
    parts: list[dict[str, Tensor]] = [{}, {}, {}, {}]
    sizes = [0, 0, 0, 0]
    for name, value in sorted(tensors.items(), key=lambda item: -item[1].nbytes):
        place = sizes.index(min(sizes))
        compact = value.detach().cpu().contiguous()
        if name in ("embed.weight", "head.weight"):
            compact = compact.bfloat16()  # as the checkpoint stores them
        elif compact.dtype == torch.int64:
            compact = compact.to(torch.int32)
        parts[place][name] = compact
        sizes[place] += compact.nbytes
    for place, part in enumerate(parts):
        save_file(part, out / f"weights-{place}.safetensors")
    (out / "log.json").write_text(json.dumps(facts))
    print(f"saved {sum(sizes) / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
