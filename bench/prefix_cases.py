"""What prefix_grid.py and memory.py run: one policy-gradient step of a small Qwen3 on G responses to one prompt.

The same weights, data and loss; unless said otherwise the same rows go to the same fused head. Optimizer apart.
  tree       rlcore: the prompt once, exact attention over the packed tree; packing is part of the step
  repeated   the prompt before each response, torch's causal attention; in micro-batches of at most MICRO tokens, whose
             gradients add up to the batch's
  grouper    the prefix-grouper package as its documentation uses it: the prompt once, its keys and values copied before
             each response's; logits of all rows, split, and the loss from them in torch
  grouped    the same package, but hidden states are split and go to our head: what attention alone makes of it
  floor      the tree's rows, packed before, through the same model without attention: no contender, but a part of the
             bound
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import rlcore as rl
from rlcore.adapters.transformers import decoder

MICRO = 16384
Result = list[Tensor]


class Size(NamedTuple):
    """The model: heads of 32, twice as many for queries as for keys."""

    layers: int = 4
    width: int = 256
    vocabulary: int = 1000


class Point(NamedTuple):
    """Tokens of the prompt, tokens of a response, responses."""

    prompt: int
    response: int
    responses: int

    @property
    def before(self) -> int:
        return self.responses * (self.prompt + self.response)

    @property
    def after(self) -> int:
        return self.prompt + self.responses * self.response

    @property
    def pairs(self) -> int:
        """Query-key pairs of the tree, per head."""
        P, S, G = self
        return P * (P + 1) // 2 + G * (S * P + S * (S + 1) // 2)


class Steps:
    """One point's data, and its contenders by name."""

    def __init__(self, point: Point, size: Size | None = None) -> None:
        size = size or Size()
        self.point, self.size = point, size
        P, S, G = point
        torch.manual_seed(0)
        self.prompt = torch.randint(size.vocabulary, (P,))
        self.answers = torch.randint(size.vocabulary, (G, S))
        self.path_ids = torch.cat([self.prompt.expand(G, -1), self.answers], dim=1)
        self.models: dict[str, Any] = {}
        self.tree = self._packed()
        self.advantage = torch.randn(G)
        self.batch = rl.TokenBatch(self.tree.target, self.tree.offsets, advantage=self.advantage)
        with torch.no_grad():
            model = self._model("tree")
            logp = rl.linear_logprob(rl.trunk(model, self.tree), model.lm_head.weight, self.tree.target).logp
        # Near the policy: no row loses its gradient to a clip.
        self.batch = self.batch.derived(old_logp=logp + 0.02 * torch.randn(G * S))
        self.objective = rl.Objective()

    def function(self, name: str) -> Callable[[], Result]:
        """Gradients from nothing: [loss, gradient of every parameter]."""
        model = self._model(name)
        losses = {"tree": self._tree, "repeated": self._repeated, "grouper": self._grouper, "grouped": self._grouped,
                  "floor": self._floor}[name]  # fmt: skip

        def step() -> Result:
            model.zero_grad(set_to_none=True)
            loss = losses(model)
            return [loss, *(p.grad for p in model.parameters())]

        return step

    def _model(self, name: str) -> Any:
        """Every contender has a copy of the same weights under its own attention."""
        if name not in self.models:
            import transformers

            layers, width, vocabulary = self.size
            config = transformers.Qwen3Config(
                vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
                num_attention_heads=width // 32, num_key_value_heads=width // 64, head_dim=32,
                tie_word_embeddings=True, max_position_embeddings=4096, dtype="float32",
            )  # fmt: skip
            own = {"grouper": grouped_attention, "grouped": grouped_attention, "floor": no_attention}
            if name in own:
                transformers.AttentionInterface.register(f"bench_{name}", own[name])
                config._attn_implementation = f"bench_{name}"
            torch.manual_seed(1)
            model = transformers.Qwen3ForCausalLM(config)
            self.models[name] = rl.attach(model) if name == "tree" else model
        return self.models[name]

    def _packed(self) -> rl.PrefixTree:
        return rl.PrefixTree.from_groups([self.prompt.tolist()], [self.answers.tolist()])

    def _backward(self, model: Any, hidden: Tensor, batch: rl.TokenBatch) -> Tensor:
        """hidden [n, H] of the rows that predict batch.target."""
        loss, _ = rl.linear_policy_loss(hidden, model.lm_head.weight, batch, self.objective)
        loss.backward()
        return loss.detach()

    def _tree(self, model: Any) -> Tensor:
        return self._backward(model, rl.trunk(model, self._packed()), self.batch)

    def _repeated(self, model: Any, micro: int = MICRO) -> Tensor:
        P, S, _ = self.point
        total = torch.zeros(())
        for part in self.batch.split(max(1, micro // (P + S)) * S):
            hidden = decoder(model)(input_ids=self.path_ids[part.sequences], use_cache=False).last_hidden_state
            total += self._backward(model, hidden[:, P - 1 : -1].flatten(0, 1), part)
        return total

    def whole(self) -> Result:
        """`repeated` as one micro-batch, whose memory the tree's is compared with."""
        model = self._model("repeated")
        return [self._repeated(model, self.point.before), *(p.grad for p in model.parameters())]

    def _grouper(self, model: Any) -> Tensor:
        assert self.batch.old_logp is not None
        logits = self._split(model)
        logp = logits.gather(-1, self.answers[..., None])[..., 0] - logits.logsumexp(-1)
        ratio, advantage = (logp - self.batch.old_logp.view_as(logp)).exp(), self.advantage[:, None]
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        loss.backward()
        return loss.detach()

    def _grouped(self, model: Any) -> Tensor:
        return self._backward(model, self._split(decoder(model)).flatten(0, 1), self.batch)

    def _split(self, module: Any) -> Tensor:
        """[G, S, ...] of the rows that predict: the module's logits, or the hidden states of one without a head."""
        from prefix_grouper import PrefixGrouper

        P, S, G = self.point
        there = torch.ones(1, P), torch.ones(G, S)
        grouper = PrefixGrouper.from_ungrouped_masks(*there, G)
        mask = torch.zeros(S, P + S).masked_fill(torch.ones(S, P + S).tril(P) == 0, float("-inf"))
        out = module(
            input_ids=grouper.concat_input(self.prompt[None], there[0], self.answers, there[1]),
            position_ids=torch.cat([torch.arange(P), torch.arange(P, P + S).repeat(G)])[None],
            use_cache=False, prefix_grouper=grouper, suffix_mask=mask,
        )  # fmt: skip
        return grouper.split_output(out[0], include_prefix_last=1)[2][:, :-1]

    def _floor(self, model: Any) -> Tensor:
        tree = self.tree
        hidden = decoder(model)(input_ids=tree.input_ids[None], position_ids=tree.position[None], use_cache=False)
        return self._backward(model, hidden.last_hidden_state[0].index_select(0, tree.loss_rows), self.batch)


def grouped_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, prefix_grouper: Any, suffix_mask: Tensor,
    scaling: float, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """prefix-grouper over torch's attention: causal for the prompt, under a lower right mask for the responses.

    The package's own masks are of padding alone, which here is none.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        own = q.shape[2] == k.shape[2]
        mask = None if own else suffix_mask
        o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=own, scale=scaling, enable_gqa=True)
        return o.transpose(1, 2)

    return prefix_grouper.forward(attention, q, k, v), None


def no_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    return _Nothing.apply(q, k, v), None


class _Nothing(torch.autograd.Function):
    """The queries as they are. Keys and values get a gradient that costs nothing, so that theirs is passed on."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.heads = k.shape[1]
        return q.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        dq = do.transpose(1, 2)
        return dq, dq[:, : ctx.heads], dq[:, : ctx.heads]


class Attention:
    """One layer's attention of a point: what a pair costs at best where nothing is shared, and FlexAttention."""

    def __init__(self, point: Point, size: Size | None = None) -> None:
        size = size or Size()
        self.point, self.heads, self.kv_heads = point, size.width // 32, size.width // 64
        length = point.prompt + point.response
        self.paths = max(1, point.after // length)
        self.pairs = self.paths * length * (length + 1) // 2

    def unshared(self, name: str) -> Callable[[], Any]:
        """Forward and backward of whole paths, about as many rows as the tree has, by "torch" or by "ours"."""
        length = self.point.prompt + self.point.response
        shapes = [(self.paths, heads, length, 32) for heads in (self.heads, self.kv_heads, self.kv_heads)]
        do = torch.randn(self.paths, length, self.heads, 32)
        if name == "torch":
            leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
            return lambda: torch.autograd.grad(
                F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True), leaves, do.transpose(1, 2)
            )
        tree = rl.PrefixTree.from_groups([[1] * length] * self.paths, [[]] * self.paths)
        leaves = [torch.randn(n * rows, heads, d, requires_grad=True) for n, heads, rows, d in shapes]
        return lambda: torch.autograd.grad(rl.prefix_attention(*leaves, tree), leaves, do.flatten(0, 1))

    def forward_of_tree(self, flex: bool) -> dict[str, Callable[[], Tensor]]:
        """ours and FlexAttention (compiled, its block mask made before) on the tree: [M, heads, 32], forward only."""
        P, S, G = self.point
        tree = rl.PrefixTree.from_groups([[1] * P], [[[1] * S] * G])
        q, k, v = (torch.randn(1, heads, tree.M, 32) for heads in (self.heads, self.kv_heads, self.kv_heads))
        rows, end = [x[0].transpose(0, 1) for x in (q, k, v)], tree.end

        @torch.no_grad()
        def ours() -> Tensor:
            return rl.prefix_attention(*rows, tree)

        if not flex:
            return {"ours": ours}
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (i < end[j])

        mask = create_block_mask(sees, None, None, tree.M, tree.M, device="cpu")
        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, dynamic=False)

        @torch.no_grad()
        def flex_attention_forward() -> Tensor:
            return compiled(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

        return {"ours": ours, "flex": flex_attention_forward}
