"""The model as the trainer sees it: log-probs of answers, and the loss of a micro-batch, in one of two layouts.

tree: prompts and answers packed as a trie, every shared token computed once (`rl.trunk`), and the head folded into the
loss, without logits in memory (`rl.linear_policy_loss`). padded: one row per answer, prompt repeated, logits and all;
for models where trees are not exact. Both take the same batch and give the same loss and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import rlcore as rl
from rlcore.adapters.transformers import decoder, head, unwrap
from rlcore.engine.errors import UserError
from rlcore.engine.lora import is_adapted
from rlcore.engine.packs import Pack
from rlcore.engine.precision import forward_pass


class Policy:
    """A Hugging Face causal LM with a layout; `why_padded` is the reason where trees could not be used."""

    def __init__(self, model: Any, pad_id: int, layout: str = "auto", temperature: float = 1.0) -> None:
        self.model, self.pad_id, self.temperature = model, pad_id, temperature
        self.why_padded: str | None = None
        self.layout = "padded"
        if layout != "padded":
            try:
                rl.attach(model)
                self.layout = "tree"
            except ValueError as error:
                if layout == "tree":
                    raise UserError(f"update.layout = tree does not fit this model: {error}") from None
                self.why_padded = str(error)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @forward_pass
    def loss(self, pack: Pack, batch: rl.TokenBatch, objective: rl.Objective) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective on the answers' tokens, batch [N] in the order of the pack, and its metrics."""
        if self.layout == "tree":
            hidden = rl.trunk(self.model, pack.tree)
            return rl.linear_policy_loss(hidden, batch=batch, objective=objective, **self._head())
        out = rl.logprob(self._logits(pack), batch.target, self.temperature, entropy=True)
        return rl.policy_loss(out.logp, batch, objective, entropy=out.entropy)

    def logp(self, pack: Pack, batch: rl.TokenBatch) -> Tensor:
        """Log-probs [N] of the answers' tokens, without gradient."""
        return self.scores(pack, batch).logp

    @torch.no_grad()
    @forward_pass
    def scores(self, pack: Pack, batch: rl.TokenBatch, entropy: bool = False) -> rl.LogProbs:
        """Log-probs [N] of the answers' tokens, and the entropies [N] of their distributions, without gradient."""
        if self.layout == "tree":
            hidden = rl.trunk(self.model, pack.tree)
            return rl.linear_logprob(hidden, target=batch.target, entropy=entropy, **self._head())
        return rl.logprob(self._logits(pack), batch.target, self.temperature, entropy=entropy)

    @forward_pass
    def hidden(self, pack: Pack) -> Tensor:
        """The decoder's last hidden states [N, H] at the positions that predict the answers' tokens."""
        if self.layout == "tree":
            return rl.trunk(self.model, pack.tree)
        ids, mask, rows = self._padded(pack)
        return decoder(unwrap(self.model))(ids, attention_mask=mask, use_cache=False).last_hidden_state[rows]

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The model as it was before its adapters, inside the block: the reference, from the same weights."""
        if not is_adapted(self.model):
            raise ValueError(f"model: expected one with adapters, got {type(self.model).__name__}")
        with self.model.disable_adapter():
            yield

    def _head(self) -> dict[str, Any]:
        return {**head(self.model)._asdict(), "temperature": self.temperature}

    def _logits(self, pack: Pack) -> Tensor:
        """[N, V] at the positions that predict the answers' tokens."""
        ids, mask, rows = self._padded(pack)
        return self.model(ids, attention_mask=mask, use_cache=False).logits[rows]

    def _padded(self, pack: Pack) -> tuple[Tensor, Tensor, Tensor]:
        """Right-padded rows with repeated prompts: ids, attention mask, and where answers' tokens are predicted."""
        pairs = pack.pairs
        width = max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids = [prompt + answer + [self.pad_id] * (width - len(prompt) - len(answer)) for prompt, answer in pairs]
        start = torch.tensor([len(prompt) for prompt, _ in pairs], device=self.device)[:, None]
        length = torch.tensor([len(answer) for _, answer in pairs], device=self.device)[:, None]
        column = torch.arange(width, device=self.device)
        mask = (column < start + length).long()
        return torch.tensor(ids, device=self.device), mask, (column >= start - 1) & (column < start + length - 1)
