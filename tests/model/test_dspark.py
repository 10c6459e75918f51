"""DSpark in the plain model against model.md 2.13 written out token by token, over explicit lists of entries."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4c.model import Transformer, init_state, make_draft, make_step
from tests.dspark import LAYOUT, TINY, tiny_model

TOKENS = 64
TOLERANCE = 2e-5


class ByHand:
    """One request. Weights by their checkpoint names; vectors, one token at a time."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.w = weights
        self.windows: list[list[Tensor]] = [[] for _ in range(3)]  # every entry ever absorbed, in order

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean() + 1e-6).sqrt() * self.w[name]

    def rotate(self, x: Tensor, position: int) -> Tensor:
        """The last 16 channels, in pairs, by position * 10000^(-2i/16); backwards for a negative position."""
        out, dim = x.clone(), 16
        for i in range(dim // 2):
            angle = torch.tensor(float(position)) * 10000.0 ** (-2 * i / dim)
            even, odd = x[-dim + 2 * i].clone(), x[-dim + 2 * i + 1].clone()
            out[-dim + 2 * i] = even * angle.cos() - odd * angle.sin()
            out[-dim + 2 * i + 1] = even * angle.sin() + odd * angle.cos()
        return out

    def entry(self, stage: int, x: Tensor, position: int) -> Tensor:
        p = f"mtp.{stage}.attn."
        return self.rotate(self.norm(self.w[p + "wkv.weight"] @ x, p + "kv_norm.weight"), position)

    def absorb(self, streams: list[Tensor]) -> None:
        """`streams`: [4, D] of one token behind each target layer."""
        tap = torch.cat([(x[0] + x[1] + x[2] + x[3]) / 4 for x in streams])
        main_x = self.norm(self.w["mtp.0.main_proj.weight"] @ tap, "mtp.0.main_norm.weight")
        for stage, window in enumerate(self.windows):
            window.append(self.entry(stage, main_x, len(window)))

    def mix(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        flat = x.flatten()
        u = self.w[f"{name}_fn"] @ flat / (flat.square().mean() + 1e-6).sqrt()
        scale, base = self.w[f"{name}_scale"], self.w[f"{name}_base"]
        pre = torch.sigmoid(u[:4] * scale[0] + base[:4]) + 1e-6
        post = 2 * torch.sigmoid(u[4:8] * scale[1] + base[4:8])
        m = F.softmax(u[8:].view(4, 4) * scale[2] + base[8:].view(4, 4), 1) + 1e-6
        m = m / (m.sum(0) + 1e-6)
        for _ in range(19):
            m = m / (m.sum(1, keepdim=True) + 1e-6)
            m = m / (m.sum(0) + 1e-6)
        return pre, post, m

    def attend(self, stage: int, xs: list[Tensor], first: int) -> list[Tensor]:
        """Rows of a block at positions `first`, `first` + 1, ...: all see the window and each other."""
        p = f"mtp.{stage}.attn."
        keys = self.windows[stage][-8:] + [self.entry(stage, x, first + i) for i, x in enumerate(xs)]
        out = []
        for i, x in enumerate(xs):
            q = self.w[p + "wq_b.weight"] @ self.norm(self.w[p + "wq_a.weight"] @ x, p + "q_norm.weight")
            heads = []
            for h, one in enumerate(q.view(4, 32)):
                one = self.rotate(one / (one.square().mean() + 1e-6).sqrt(), first + i)
                logits = torch.stack([one @ k for k in keys] + [self.w[p + "attn_sink"][h] * 32**0.5]) * 32**-0.5
                weight = F.softmax(logits, 0)
                heads.append(self.rotate(sum(w * k for w, k in zip(weight, keys, strict=False)), -first - i))
            groups = [torch.cat(heads[:2]), torch.cat(heads[2:])]
            wo_a = self.w[p + "wo_a.weight"].view(2, 16, 64)
            out.append(self.w[p + "wo_b.weight"] @ torch.cat([wo_a[g] @ groups[g] for g in range(2)]))
        return out

    def moe(self, stage: int, x: Tensor) -> Tensor:
        p = f"mtp.{stage}.ffn."

        def expert(w1: Tensor, w2: Tensor, w3: Tensor, weight: float | Tensor) -> Tensor:
            return w2 @ (F.silu((w1 @ x).clamp(max=1.0)) * (w3 @ x).clamp(-1.0, 1.0) * weight)

        scores = F.softplus(self.w[p + "gate.weight"] @ x).sqrt()
        picked = (scores + self.w[p + "gate.bias"]).topk(2).indices
        out = expert(*(self.w[f"{p}shared_experts.w{i}.weight"] for i in (1, 2, 3)), 1.0)
        for e in picked:
            weight = scores[e] / scores[picked].sum() * 1.5
            out = out + expert(*(self.w[f"{p}experts.w{i}"][e] for i in (1, 2, 3)), weight)
        return out

    def draft(self, accepted: int) -> tuple[list[int], list[float]]:
        first = len(self.windows[0])
        streams = [self.w["embed.weight"][token].repeat(4, 1) for token in [accepted, 95, 95, 95, 95]]
        for stage in range(3):
            p = f"mtp.{stage}."
            for part in ("attn", "ffn"):
                mixed = [self.mix(x, f"{p}hc_{part}") for x in streams]
                inputs = [pre @ x for (pre, _, _), x in zip(mixed, streams, strict=True)]
                xs = [self.norm(x, f"{p}{part}_norm.weight") for x in inputs]
                ys = self.attend(stage, xs, first) if part == "attn" else [self.moe(stage, x) for x in xs]
                old, streams = streams, []
                for (_, post, m), y, x in zip(mixed, ys, old, strict=True):
                    streams.append(torch.outer(post, y) + m.T @ x)
        drafts, confidences, token = [], [], accepted
        for x in streams:
            flat = x.flatten()
            u = self.w["mtp.2.hc_head_fn"] @ flat / (flat.square().mean() + 1e-6).sqrt()
            x = (torch.sigmoid(u * self.w["mtp.2.hc_head_scale"] + self.w["mtp.2.hc_head_base"]) + 1e-6) @ x
            before = self.w["mtp.2.markov_head.markov_w1.weight"][token]
            logits = self.w["head.weight"] @ self.norm(x, "mtp.2.norm.weight")
            logits = logits + self.w["mtp.2.markov_head.markov_w2.weight"] @ before
            confidences.append(float(self.w["mtp.2.confidence_head.proj.weight"][0] @ torch.cat((x, before))))
            token = int(logits.argmax())
            drafts.append(token)
        return drafts, confidences


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model()


def absorbed(model: Transformer, ids: list[Tensor], chunks: list[int]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """All requests through the main model in chunks of these lengths, each absorbed; the streams by layer."""
    state, start, parts = init_state(TINY, LAYOUT, len(ids), TOKENS), 0, []
    longest = max(len(one) for one in ids)
    for length in [*chunks, longest]:
        spans = [(r, start, one[start : start + length]) for r, one in enumerate(ids) if len(one) > start]
        if spans:
            step = make_step(TINY, LAYOUT, spans, TOKENS)
            streams, state = model.run(step, state)
            state = model.absorb(model.tap(streams), step, state)
            parts.append((spans, streams))
        start += length
    by_request = [[] for _ in ids]
    for spans, streams in parts:
        row = 0
        for r, _, one in spans:
            by_request[r].append(torch.stack([s[row : row + len(one)] for s in streams]))
            row += len(one)
    return [torch.cat(x, 1) for x in by_request], state


@torch.no_grad()
def test_drafts_are_those_of_the_formulas(model: Transformer) -> None:
    """Requests of one token, of less than a window, of a window, and of many, drafted in one batch."""
    draw = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, 96, (n,), generator=draw) for n in (1, 5, 8, 9, 37)]
    streams, state = absorbed(model, ids, [])
    accepted = [(r, len(one), int(torch.randint(0, 96, (), generator=draw))) for r, one in enumerate(ids)]
    drafts, confidences = model.draft(make_draft(TINY, LAYOUT, accepted, TOKENS), state)
    assert (drafts.dtype, drafts.shape) == (torch.int64, (5, 5))
    assert (confidences.dtype, confidences.shape) == (torch.float32, (5, 5))
    weights = dict(model.state_dict())
    for r, (_, length, token) in enumerate(accepted):
        hand = ByHand(weights)
        for t in range(length):
            hand.absorb([streams[r][layer + 1, t] for layer in (1, 2, 3)])
        expected, sure = hand.draft(token)
        assert drafts[r].tolist() == expected, f"request {r}"
        assert (confidences[r] - torch.tensor(sure)).abs().max() < TOLERANCE
    assert len({tuple(row) for row in drafts.tolist()}) > 1


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1, 1, 1], [7, 9], [36], [20, 1, 3, 2]])
def test_absorbing_in_chunks_is_absorbing_at_once(model: Transformer, chunks: list[int]) -> None:
    ids = [torch.arange(n) * 7 % 96 for n in (37, 12)]
    _, once = absorbed(model, ids, [])
    _, state = absorbed(model, ids, chunks)
    accepted = [(0, 37, 3), (1, 12, 4)]
    step = make_draft(TINY, LAYOUT, accepted, TOKENS)
    drafts, confidences = model.draft(step, state)
    expected, sure = model.draft(step, once)
    assert torch.equal(drafts, expected)
    torch.testing.assert_close(confidences, sure, rtol=1e-4, atol=1e-4)
    for i in range(3):
        torch.testing.assert_close(state[f"mtp.{i}.window"], once[f"mtp.{i}.window"], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_draft_leaves_no_trace_and_rejected_tokens_are_overwritten(model: Transformer) -> None:
    """Drafting changes no state; absorbing rejected tokens changes no later draft."""
    ids = torch.arange(30) * 11 % 96
    rest = [(0, 20, ids[20:])]

    def drafts_after(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return model.draft(make_draft(TINY, LAYOUT, [(0, 20, int(ids[20]))], TOKENS), state)

    _, state = absorbed(model, [ids[:20]], [])
    before = {name: tensor.clone() for name, tensor in state.items()}
    expected = drafts_after(state)
    assert all(torch.equal(state[name], before[name]) for name in before)
    wrong = make_step(TINY, LAYOUT, [(0, 20, (ids[20:26] + 1) % 96)], TOKENS)
    streams, rejected = model.run(wrong, state)
    rejected = model.absorb(model.tap(streams), wrong, rejected)
    assert not torch.equal(rejected["mtp.1.window"], state["mtp.1.window"])
    assert all(torch.equal(a, b) for a, b in zip(drafts_after(rejected), expected, strict=True))
    step = make_step(TINY, LAYOUT, rest, TOKENS)
    streams, _ = model.run(step, state)
    states = [model.absorb(model.tap(streams), step, one) for one in (state, rejected)]
    at_end = [model.draft(make_draft(TINY, LAYOUT, [(0, 30, 5)], TOKENS), one) for one in states]
    assert all(torch.equal(a, b) for a, b in zip(*at_end, strict=True))


@torch.no_grad()
def test_every_row_sees_the_rows_behind_it(model: Transformer) -> None:
    """Not causal: another noise token changes the first draft's confidence too."""
    _, state = absorbed(model, [torch.arange(12)], [])
    step = make_draft(TINY, LAYOUT, [(0, 12, 5)], TOKENS)
    _, confidences = model.draft(step, state)
    changed = {**step, "token_ids": torch.tensor([5, 95, 95, 95, 17])}
    _, other = model.draft(changed, state)
    assert (confidences[0, 0] - other[0, 0]).abs() > 1e-5


def test_parameters_are_the_checkpoints_names() -> None:
    with torch.device("meta"):
        names = set(Transformer(TINY).state_dict())
        plain = set(Transformer(dataclasses.replace(TINY, num_nextn_predict_layers=0)).state_dict())
    own = {name for name in names if not name.startswith("layers.")}
    assert {"mtp.0.main_proj.weight", "mtp.0.main_norm.weight", "mtp.1.attn.wkv.weight", "mtp.2.ffn.gate.bias"} <= own
    assert {"mtp.2.norm.weight", "mtp.2.markov_head.markov_w1.weight", "mtp.2.confidence_head.proj.weight"} <= own
    assert not {"mtp.0.e_proj.weight", "mtp.1.main_proj.weight", "mtp.1.hc_head_fn", "mtp.0.norm.weight"} & own
    assert names == plain
