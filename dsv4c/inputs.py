"""What programs are run on to compare them: token ids of some requests, and the weights.

    Inputs.random(config, seed)          seeded ids and weights that meet the model's clamps; any config
    Inputs.of_prompts(checkpoint, tokenizer, prompts)      a checkpoint and text

Steps follow from the ids: a chunk of every other request; the rest of these beside the others' whole prompts; and one
token of each; each divided where it is too long. So every run has prefill, chunks that begin inside a window, decode,
and requests side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4c.chat.tokenizer import Tokenizer
from dsv4c.checkpoint.dummy import DummySource
from dsv4c.checkpoint.source import WeightSource
from dsv4c.config import ModelConfig, StateLayout
from dsv4c.errors import ConfigError
from dsv4c.model.state import make_step

FIRST_CHUNK = 0.6  # of a request; the rest begins inside a window of every compressor
_EMBEDDED = (1.0, 2.0**-10, 2.0**-20)  # sizes of embeddings: an eps of 1e-6 under a root is nothing, as much, or all
_POWERS: Mapping[tuple[str, ...], int] = {
    (
        ".w1.scale",
        ".w3.scale",
        ".w1.weight_scale_2",
        ".w3.weight_scale_2",
    ): 3,  # activations of deviation 8 meet a clamp at 10 in one place of five
    (
        ".w2.scale",
        ".wo_b.scale",
        ".w2.weight_scale_2",
    ): -14,  # what a sublayer adds to the streams leaves small tokens small
}


class ReachingSource(DummySource):
    """Dummy weights that reach the corners: experts' gates meet their clamp, and some tokens' rows every norm's eps."""

    def raw(self, name: str) -> Tensor:
        """See DummySource."""
        found = super().raw(name)
        for ends, powers in _POWERS.items():
            if name.endswith(ends) and found.dtype == torch.float32:
                return found * 2.0**powers
            if name.endswith(ends):
                return (found.view(torch.uint8).int() + powers).to(torch.uint8).view(torch.float8_e8m0fnu)
        if name == "embed.weight":
            return found * torch.tensor(_EMBEDDED)[torch.arange(len(found)) % len(_EMBEDDED)].unsqueeze(1).to(found)
        return found


@dataclass(frozen=True)
class Inputs:
    """Token ids [n] of every request in `ids`, n >= 2 (the last one is only a next token), and the weights' `source`.

    `text_bytes`: UTF-8 bytes that all tokens but the first of each request stand for; 0 where there is no text.
    """

    ids: tuple[Tensor, ...]
    source: WeightSource
    text_bytes: int = 0
    step_tokens: int = 512
    """The most of one step."""

    def __post_init__(self) -> None:
        if not self.ids or any(len(one) < 2 for one in self.ids):
            raise ConfigError("inputs need requests of two tokens or more")

    @classmethod
    def random(cls, config: ModelConfig, seed: int = 0) -> Inputs:
        """One request long enough to complete two entries of every kind, and a short one; seeded weights."""
        draw = torch.Generator().manual_seed(seed)
        most = config.max_position_embeddings
        lengths = (min(most, 2 * max((*config.ratios, config.sliding_window // 2)) + 7), min(most, 24))
        ids = tuple(torch.randint(config.vocab_size, (n,), generator=draw) for n in lengths)
        return cls(ids, ReachingSource(config, seed))

    @classmethod
    def of_prompts(cls, source: WeightSource, tokenizer: Tokenizer, prompts: Sequence[str], most: int = 512) -> Inputs:
        """Every prompt behind BOS, cut to `most` tokens. Raises ConfigError for a prompt without a token."""
        found, count = [], 0
        for prompt in prompts:
            ids = tokenizer.encode(prompt)[:most]
            if not ids:
                raise ConfigError(f"the prompt {prompt[:40]!r} has no token")
            found.append(torch.tensor([tokenizer.bos_token_id, *ids]))
            count += sum(len(tokenizer.token_bytes(token)) for token in ids)
        return cls(tuple(found), source, count)

    @property
    def config(self) -> ModelConfig:
        """Of the model that the weights belong to."""
        return self.source.config

    @property
    def tokens(self) -> int:
        """Of the longest request, as state is made for."""
        return max(map(len, self.ids))

    def targets(self, layout: StateLayout) -> Tensor:
        """[S] the token that follows each row of logits."""
        return torch.cat([step["next_ids"] for step in self.steps(layout)])

    def steps(self, layout: StateLayout) -> list[dict[str, Tensor]]:
        """Inputs of every step, `next_ids` [T] among them: what follows each token."""
        spans: list[list[tuple[int, int, int]]] = [[], [], []]
        for request, ids in enumerate(self.ids):
            count = len(ids) - 1
            first = int(count * FIRST_CHUNK) if request % 2 == 0 else 0
            spans[0].append((request, 0, first))
            spans[1].append((request, first, count - 1))
            spans[2].append((request, max(first, count - 1), count))
        return [self._step(layout, part) for one in spans for part in self._parts(one)]

    def _parts(self, spans: Sequence[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
        """These spans in order, none of them empty, in runs of at most `step_tokens` tokens."""
        part: list[tuple[int, int, int]] = []
        room = self.step_tokens
        for request, start, stop in spans:
            while start < stop:
                count = min(stop - start, room)
                part.append((request, start, start + count))
                start, room = start + count, room - count
                if not room:
                    yield part
                    part, room = [], self.step_tokens
        if part:
            yield part

    def _step(self, layout: StateLayout, spans: Sequence[tuple[int, int, int]]) -> dict[str, Tensor]:
        given = [(request, start, self.ids[request][start:stop]) for request, start, stop in spans]
        step = make_step(self.config, layout, given, self.tokens)
        following = torch.cat([self.ids[request][start + 1 : stop + 1] for request, start, stop in spans])
        return {**step, "next_ids": following}
