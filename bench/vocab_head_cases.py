"""What test_vocab_head.py and memory.py run: our functions, the bare products, plain torch and peers, by name.

bench/gpu/vocab_head.py runs them too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

import rlcore as rl

FRESH = ("h @ w.t()", "L @ w", "L.t() @ h")
PREALLOCATED = tuple(f"{name}, preallocated" for name in FRESH)
SEQUENCES = 8
CLIP = 0.2
Results = tuple[Tensor, ...]
# Whose result, and which part of it: a frozen head has no gradient, Liger returns no entropy.
EQUALS: dict[str, tuple[str, slice]] = {
    "torch": ("policy_loss", slice(None)),
    "torch_entropy": ("entropy_gradient", slice(None)),
    "trl": ("policy_loss", slice(None)),
    "liger": ("policy_loss", slice(1, None)),
    "liger_by_sequence": ("policy_loss", slice(1, None)),
    "cce": ("policy_loss", slice(1, None)),
    "compiled": ("policy_loss", slice(None)),
    "cuda": ("policy_loss", slice(None)),
    "low_memory": ("policy_loss", slice(None)),
    "frozen_policy_loss": ("policy_loss", slice(0, 3)),
    "frozen_logprob": ("logprob", slice(0, 2)),
}


def uniform_(x: Tensor, std: float) -> Tensor:
    """In place, so that the peak of the resident set is not that of making the inputs."""
    return x.uniform_(-(3**0.5) * std, 3**0.5 * std)


class Cases:
    """One minibatch of 8 sequences and everything that can be done with it."""

    def __init__(self, N: int, H: int, V: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.N, self.H, self.V = N, H, V
        self.hidden = uniform_(torch.empty(N, H, dtype=dtype, device=device), 1.0).requires_grad_()
        self.weight = uniform_(torch.empty(V, H, dtype=dtype, device=device), H**-0.5).requires_grad_()
        self.target = torch.randint(V, (N,), device=device)
        self.upstream = torch.randn(N, device=device) / N
        # Without a gradient these rows cost a forward pass; masked, they cost nothing.
        self.dropped = torch.rand(N, device=device).argsort().argsort() < 0.6 * N
        self.dense_advantage = torch.randn(SEQUENCES, device=device).repeat_interleave(N // SEQUENCES)
        # Near the policy: no row loses its gradient to a clip.
        self.old_logp = self._log_probs() + 0.02 * torch.randn(N, device=device)
        offsets = torch.arange(SEQUENCES + 1, device=device) * (N // SEQUENCES)
        self.batch = rl.TokenBatch(self.target, offsets, advantage=self.dense_advantage, old_logp=self.old_logp)
        self.objective = rl.Objective(clip=(CLIP, CLIP))
        self.bonus = rl.Objective(clip=(CLIP, CLIP), entropy=0.01)
        self._products: list[Tensor] | None = None

    @torch.no_grad()
    def _log_probs(self) -> Tensor:
        rows = range(0, self.N, 64)
        scores = ((self.hidden[i : i + 64].float() @ self.weight.float().t()).log_softmax(-1) for i in rows)
        return torch.cat([s.gather(-1, t[:, None])[:, 0] for s, t in zip(scores, self.target.split(64))])

    def function(self, name: str) -> Callable[[], Results]:
        if name in FRESH or name in PREALLOCATED:
            return self._product(name)
        if name == "inplace_backward":
            return self._inplace_backward()
        batch, frozen = self.batch, self.weight.detach()
        functions: dict[str, Callable[[], Results]] = {
            "policy_loss": lambda: self._policy_loss(batch, self.objective),
            "entropy_gradient": lambda: self._policy_loss(batch, self.bonus),
            "zero_rows": lambda: self._policy_loss(zero_batch, self.objective),
            "masked_rows": lambda: self._policy_loss(masked_batch, self.objective),
            "frozen_policy_loss": lambda: self._policy_loss(batch, self.objective, frozen),
            "frozen_logprob": lambda: self._logprob(frozen),
            "logprob": lambda: self._logprob(self.weight),
            "logprob_entropy": self._logprob_entropy,
            "torch": self._torch,
            "torch_entropy": lambda: self._torch(0.01),
            "trl": self._trl,
            "liger": self._liger,
            "liger_by_sequence": lambda: self._liger(1),
            "cce": self._cce,
        }
        zero_batch = replace(batch, advantage=self.dense_advantage.masked_fill(self.dropped, 0.0))
        masked_batch = replace(batch, mask=~self.dropped, totals=None)
        return functions[name]

    def _product(self, name: str) -> Callable[[], Results]:
        h, w = self.hidden.detach(), self.weight.detach()
        if self._products is None:
            self._products = [h @ w.t(), torch.empty_like(h), torch.empty_like(w)]
        L, dh, dw = self._products
        products = {
            FRESH[0]: lambda: h @ w.t(),
            FRESH[1]: lambda: L @ w,
            FRESH[2]: lambda: L.t() @ h,
            PREALLOCATED[0]: lambda: torch.mm(h, w.t(), out=L),
            PREALLOCATED[1]: lambda: torch.mm(L, w, out=dh),
            PREALLOCATED[2]: lambda: torch.mm(L.t(), h, out=dw),
        }
        return products[name]

    def _gradients(self, loss: Tensor, inputs: tuple[Tensor, ...]) -> Results:
        return (loss.detach(), *torch.autograd.grad(loss, inputs))

    def _policy_loss(self, batch: rl.TokenBatch, objective: rl.Objective, weight: Tensor | None = None) -> Results:
        """Entropy metric, loss, gradients."""
        loss, metrics = rl.linear_policy_loss(self.hidden, self.weight if weight is None else weight, batch, objective)
        return (metrics["entropy"], *self._gradients(loss, self._inputs(weight is None)))

    def _logprob(self, weight: Tensor) -> Results:
        logp = rl.linear_logprob(self.hidden, weight, self.target).logp
        loss = (logp * self.upstream).sum()
        return self._gradients(loss, self._inputs(weight.requires_grad))

    def _logprob_entropy(self) -> Results:
        out = rl.linear_logprob(self.hidden, self.weight, self.target, entropy=True)
        loss = ((out.logp + out.entropy) * self.upstream).sum()
        return self._gradients(loss, self._inputs(True))

    def _inplace_backward(self) -> Callable[[], Results]:
        """Log-probs of logits that exist and the backward pass in the logits' memory: for one run."""
        logits = uniform_(torch.empty(self.N, self.V, dtype=self.hidden.dtype), 1.0)
        logits.add_(torch.zeros((), dtype=logits.dtype, requires_grad=True))

        def run() -> Results:
            logp = rl.logprob(logits, self.target, inplace_backward=True).logp
            (logp * self.upstream).sum().backward()
            return (logp.detach(),)

        return run

    def _inputs(self, head: bool) -> tuple[Tensor, ...]:
        return (self.hidden, self.weight) if head else (self.hidden,)

    def _surrogate(self, logp: Tensor, advantage: Tensor, keep: Tensor | None = None) -> Tensor:
        """The clipped surrogate, token mean, as a trainer writes it."""
        ratio = (logp - self.old_logp).exp()
        loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
        return loss.mean() if keep is None else (loss * keep).sum() / keep.sum()

    def _torch(self, bonus: float = 0.0) -> Results:
        loss, entropy = self._plain(self.hidden, self.weight, bonus)
        return (entropy.detach(), *self._gradients(loss, (self.hidden, self.weight)))

    def _plain(self, hidden: Tensor, weight: Tensor, bonus: float = 0.0) -> tuple[Tensor, Tensor]:
        """(loss, entropy); the entropy is a metric, or a term of the loss."""
        scores = (hidden @ weight.t()).float().log_softmax(-1)
        logp = scores.gather(-1, self.target[:, None])[:, 0]
        with torch.set_grad_enabled(bonus > 0):
            entropy = -(scores.exp() * scores).sum(-1).mean()
        loss = self._surrogate(logp, self.dense_advantage)
        return (loss - bonus * entropy if bonus else loss), entropy

    def compiled(self, backend: str) -> Callable[[], Results]:
        """`_torch` under torch.compile."""
        fused = torch.compile(self._plain, fullgraph=True, backend=backend)

        def run() -> Results:
            loss, entropy = fused(self.hidden, self.weight)
            return (entropy.detach(), *self._gradients(loss, (self.hidden, self.weight)))

        return run

    def _trl(self) -> Results:
        """The path of its trainer: its chunks of the vocabulary, log-prob and entropy; the loss in torch."""
        from trl.kernels import ChunkedLogProbFunction

        logp, entropy, *_ = ChunkedLogProbFunction.apply(
            self.hidden, self.weight, None, self.target, 1.0, 32768, None, 1.0, ("entropy",)
        )
        loss = self._surrogate(logp, self.dense_advantage)
        return (entropy.detach().mean(), *self._gradients(loss, (self.hidden, self.weight)))

    def _cce(self) -> Results:
        """Cut-cross-entropy's negative log-probs, no gradient left out, the loss in torch; it has no entropy."""
        from cut_cross_entropy import linear_cross_entropy

        logp = -linear_cross_entropy(self.hidden, self.weight, self.target, reduction="none", filter_eps=None)
        return self._gradients(self._surrogate(logp, self.dense_advantage), (self.hidden, self.weight))

    def _liger(self, sequences: int = SEQUENCES) -> Results:
        """So many sequences in one chunk: on the CPU all are faster than its default of one; it has no entropy."""
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        def by_sequence(x: Tensor) -> Tensor:
            return x.view(SEQUENCES, -1, *x.shape[1:])

        head = LigerFusedLinearGRPOLoss(
            beta=0.0, compiled=self.hidden.is_cuda, use_ref_model=False, chunk_size=sequences, epsilon_low=CLIP,
            epsilon_high=CLIP,
        )  # fmt: skip
        target, old, advantage = map(by_sequence, (self.target, self.old_logp, self.dense_advantage))
        loss, _ = head(
            by_sequence(self.hidden), self.weight, target, torch.ones_like(target), advantage[:, 0],
            old_per_token_logps=old,
        )  # fmt: skip
        return self._gradients(loss, (self.hidden, self.weight))

    def expected(self, names: Iterable[str]) -> dict[str, Results]:
        """What `function(name)` must return, in plain torch, for every name but those of bare products.

        One graph for all: log-probs and entropies once, one backward pass for each loss.
        """
        wanted = {name: EQUALS.get(name, (name, slice(None))) for name in names if name not in FRESH + PREALLOCATED}
        leaves = self.hidden, self.weight
        if self.hidden.dtype != torch.float32:  # logits are never rounded to less
            leaves = tuple(x.detach().float().requires_grad_() for x in leaves)
        scores = (leaves[0] @ leaves[1].t()).log_softmax(-1)
        logp = scores.gather(-1, self.target[:, None])[:, 0]
        entropy = -(scores.exp() * scores).sum(-1)
        plain, kept = self._surrogate(logp, self.dense_advantage), (~self.dropped).float()
        losses = {
            "policy_loss": plain,
            "entropy_gradient": plain - 0.01 * entropy.mean(),
            "zero_rows": self._surrogate(logp, self.dense_advantage.masked_fill(self.dropped, 0.0)),
            "masked_rows": self._surrogate(logp, self.dense_advantage, kept),
            "logprob": (logp * self.upstream).sum(),
            "logprob_entropy": ((logp + entropy) * self.upstream).sum(),
        }
        found: dict[str, Results] = {}
        for name in {base for base, _ in wanted.values()}:
            gradients = torch.autograd.grad(losses[name], leaves, retain_graph=True)
            mean = (entropy * kept).sum() / kept.sum() if name == "masked_rows" else entropy.mean()
            first = () if name.startswith("logprob") else (mean.detach(),)
            found[name] = (*first, losses[name].detach(), *gradients)
        return {name: found[base][part] for name, (base, part) in wanted.items()}
