"""What each operator costs, and refusal where either counter would guess."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from pieces import LINEAR, TOKENS, Calls
from torch import Tensor, nn
from torch.nn import functional as F

from ltm_retrofit import operators
from ltm_retrofit.errors import CountError
from ltm_retrofit.macs import count_macs, count_macs_quick


def macs_of(function: Callable[[Tensor], object]) -> int:
    return count_macs(Calls(function), TOKENS).total - LINEAR


def sdpa(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], **extra: object) -> Callable[[Tensor], Tensor]:
    return lambda x: F.scaled_dot_product_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), **extra)


OPERATORS: dict[str, tuple[Callable[[Tensor], object], int]] = {
    "matmul_batched": (lambda x: x @ x.mT, 2 * 5 * 5 * 8),
    "matmul_unbatched_by_batched": (lambda x: torch.zeros(3, 5) @ x, 2 * 3 * 5 * 8),
    "matmul_broadcast": (lambda x: x[:, None] @ x.mT[None], 2 * 2 * 5 * 5 * 8),
    "matmul_by_vector": (lambda x: x @ x[0, 0], 2 * 5 * 8),
    "vector_by_matmul": (lambda x: x[0, :, 0] @ x, 2 * 5 * 8),
    "vector_by_vector": (lambda x: x[0, 0] @ x[0, 1], 8),
    "mv": (lambda x: torch.mv(x[0], x[0, 0]), 5 * 8),
    "dot": (lambda x: torch.dot(x[0, 0], x[0, 1]), 8),
    "addmv": (lambda x: torch.addmv(x[0, :, 0], x[0], x[0, 0]), 5 * 8),
    "addmm": (lambda x: torch.addmm(torch.zeros(5, 5), x[0], x[0].T), 5 * 5 * 8),
    "baddbmm": (lambda x: torch.baddbmm(torch.zeros(2, 5, 5), x, x.mT), 2 * 5 * 5 * 8),
    "baddbmm_in_place": (lambda x: torch.zeros(2, 5, 5).baddbmm_(x, x.mT), 2 * 5 * 5 * 8),
    "addbmm": (lambda x: torch.addbmm(torch.zeros(5, 5), x, x.mT), 2 * 5 * 5 * 8),
    "inner": (lambda x: torch.inner(x, x), 2 * 5 * 2 * 5 * 8),
    "tensordot": (lambda x: torch.tensordot(x, x, dims=([0, 2], [0, 2])), 5 * 5 * 2 * 8),
    "linear_of_vector": (lambda x: F.linear(x[0, 0], torch.zeros(3, 8), torch.zeros(3)), 3 * 8),
    "cdist": (lambda x: torch.cdist(x, x), 2 * 5 * 5 * 8),
    "cdist_broadcast": (lambda x: torch.cdist(x, x[:1, :3]), 2 * 5 * 3 * 8),
    "cdist_by_product": (lambda x: torch.cdist(torch.zeros(30, 8) + x[0, 0], torch.zeros(40, 8)), 30 * 40 * 8),
    "pdist": (lambda x: F.pdist(x[0]), 10 * 8),
    "einsum": (lambda x: torch.einsum("bnc,bmc->bnm", x, x), 2 * 5 * 5 * 8),
    "einsum_implicit": (lambda x: torch.einsum("bnc,bmc", x, x), 5 * 5 * 2 * 8),
    "einsum_broadcast": (lambda x: torch.einsum("bnc,mc->bnm", x, x[0]), 2 * 5 * 5 * 8),
    "einsum_ellipsis": (lambda x: torch.einsum("...nc,mc->...nm", x[None], x[0]), 2 * 5 * 5 * 8),
    "einsum_dot": (lambda x: torch.einsum("bnc,bnc->bn", x, x), 2 * 5 * 8),
    "einsum_sums_first": (lambda x: torch.einsum("bnc,mc->bm", x, x[0]), 2 * 5 * 8),
    "einsum_elementwise": (lambda x: torch.einsum("bnc,bc->bnc", x, x[:, 0]), 0),
    "einsum_of_size_one": (lambda x: torch.einsum("bnc,bmc->bnm", x[..., :1], x[..., :1]), 0),
    "einsum_transpose": (lambda x: torch.einsum("bnc->bcn", x), 0),
    "conv": (lambda x: F.conv1d(x, torch.zeros(3, 5, 3), padding=1), 2 * 3 * 8 * 5 * 3),
    "conv_unbatched": (lambda x: F.conv1d(x[0], torch.zeros(3, 5, 3)), 3 * 6 * 5 * 3),
    "conv_same": (lambda x: F.conv1d(x, torch.zeros(3, 5, 3), padding="same"), 2 * 3 * 8 * 5 * 3),
    "conv_depthwise": (lambda x: F.conv1d(x, torch.zeros(5, 1, 3), groups=5), 2 * 5 * 6 * 3),
    "conv_transposed": (lambda x: F.conv_transpose1d(x, torch.zeros(5, 3, 2), stride=2), 2 * 5 * 8 * 3 * 2),
    "sdpa": (sdpa((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), 2 * 3 * 5 * 7 * 16),
    "sdpa_wider_values": (sdpa((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 12)), 2 * 3 * 5 * 7 * 20),
    "sdpa_grouped_queries": (sdpa((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), enable_gqa=True), 2 * 4 * 5 * 7 * 16),
    "sdpa_broadcast": (sdpa((1, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), 2 * 3 * 5 * 7 * 16),
    "sdpa_masked": (sdpa((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), attn_mask=torch.zeros(5, 7)), 2 * 3 * 5 * 7 * 16),
    "sdpa_causal": (sdpa((2, 3, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8), is_causal=True), 2 * 3 * 5 * 5 * 16),
    "sdpa_one_head": (sdpa((2, 5, 8), (2, 7, 8), (2, 7, 8)), 2 * 5 * 7 * 16),
    "sdpa_windows": (sdpa((2, 4, 3, 5, 8), (2, 4, 3, 7, 8), (2, 4, 3, 7, 8)), 2 * 4 * 3 * 5 * 7 * 16),
}


def merge_by_matching(x: Tensor) -> Tensor:
    """Bipartite soft matching as ToMe does it: everything in it but the scores is free of MACs."""
    unit = x / x.norm(dim=-1, keepdim=True)
    scores = unit[:, ::2] @ unit[:, 1::2].mT
    best, partner = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    width = x.shape[-1]
    source = x[:, ::2].gather(1, order[:, :1].expand(-1, -1, width))
    into = partner[..., None].gather(1, order[:, :1]).expand(-1, -1, width)
    merged = x[:, 1::2].scatter_reduce(1, into, source, reduce="mean")
    top = x.norm(dim=-1).topk(2).indices.sort().values
    return torch.cat([merged, x.gather(1, top[..., None].expand(-1, -1, width)).softmax(-1)], dim=1)


FREE: dict[str, Callable[[Tensor], object]] = {
    "elementwise": lambda x: F.gelu(x * x + x.sigmoid() - x.exp().clamp(max=3) / 2),
    "in_place": lambda x: x.clone().add_(1).mul_(x).relu_(),
    "comparison": lambda x: torch.where((x > 0) & ~(x == 1), x, x.new_zeros(()).expand_as(x)),
    "reductions": lambda x: (x.sum(1), x.mean(-1), x.std(-1), x.var(1), x.amax(-1), x.cumsum(-1), x.logsumexp(-1)),
    "norms": lambda x: F.layer_norm(x, (8,)) + F.group_norm(x, 5) + F.rms_norm(x, (8,)) + F.normalize(x, dim=-1),
    "weight_norm": lambda x: torch._weight_norm(x, x[:, :1, :1]),
    "linalg_norm": lambda x: torch.linalg.norm(x, dim=-1),
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(5), torch.ones(5)),
    "pooling": lambda x: (F.adaptive_avg_pool2d(x[None], 1), F.avg_pool2d(x[None], 2), F.max_pool2d(x[None], 2)),
    "interpolation": lambda x: F.interpolate(x[None], size=(7, 7), mode="bicubic", antialias=True),
    "unfold": lambda x: F.pad(F.pixel_shuffle(F.unfold(x[None], 2)[..., None], 2), (1, 1)),
    "products_of_all": lambda x: (torch.outer(x[0, 0], x[0, 1]), torch.kron(x[0], x[0])),
    "losses": lambda x: (F.mse_loss(x, x * 2), F.l1_loss(x, x * 2), F.smooth_l1_loss(x, x * 2), F.huber_loss(x, x * 2)),
    "losses_of_classes": lambda x: (
        F.binary_cross_entropy_with_logits(x, x.sigmoid()),
        F.binary_cross_entropy(x.sigmoid(), x.sigmoid()),
        F.kl_div(x.log_softmax(-1), x.softmax(-1)),
        F.cross_entropy(x[0], torch.arange(5)),
        F.nll_loss(x[0].log_softmax(-1), torch.arange(5)),
        F.soft_margin_loss(x, x.sign()),
        F.multi_margin_loss(x[0], torch.arange(5)),
    ),
    "losses_of_pairs": lambda x: (
        F.cosine_embedding_loss(x[0], x[1], x[0, :, 0].sign()),
        F.margin_ranking_loss(x[0], x[1], x[0].sign()),
        F.triplet_margin_loss(x[0], x[1], x[1] * 2),
        F.hinge_embedding_loss(x, x.sign()),
        F.poisson_nll_loss(x, x.exp()),
        F.gaussian_nll_loss(x, x * 2, x.exp()),
    ),
    "rare_functions": lambda x: (x.lgamma(), x.erfinv(), torch.special.i0(x), F.celu(x), x.copysign(x), x.sgn_()),
    "random": lambda x: x + torch.rand_like(x) + torch.randn(8) + F.dropout(x, 0.5),
    "views": lambda x: x.reshape(2, 5, 2, 4).permute(2, 0, 1, 3).flatten(1).unbind(0)[0].roll(1).flip(0),
    "indexing": lambda x: (x[:, [0, 2]], F.one_hot(x.argmax(-1), 8), F.embedding(x.argmax(-1), torch.zeros(8, 2))),
}

HEAVY: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "solve": (lambda x: torch.linalg.solve(torch.eye(5), x), "solve"),
    "svd": (lambda x: torch.linalg.svd(x), "svd"),
    "spectral_norm": (lambda x: torch.linalg.norm(x[0], ord=2), "svd"),
    "fft": (lambda x: torch.fft.rfft2(x).real, "fft"),
    "bilinear": (lambda x: F.bilinear(x, x, torch.zeros(3, 8, 8)), "_trilinear|bilinear"),
}


class TestOperators:
    @pytest.mark.parametrize("name", OPERATORS)
    def test_counted(self, name: str) -> None:
        function, expected = OPERATORS[name]
        assert macs_of(function) == expected

    @pytest.mark.parametrize("name", OPERATORS)
    def test_counted_by_the_quick_counter(self, name: str) -> None:
        function, expected = OPERATORS[name]
        with torch.no_grad():
            assert count_macs_quick(lambda: function(TOKENS)) == expected

    @pytest.mark.parametrize("name", FREE)
    def test_free(self, name: str) -> None:
        assert macs_of(FREE[name]) == 0

    def test_merging_costs_its_scores(self) -> None:
        assert macs_of(merge_by_matching) == 2 * 3 * 2 * 8

    @pytest.mark.parametrize("name", HEAVY)
    def test_refused(self, name: str) -> None:
        function, operator = HEAVY[name]
        with pytest.raises(CountError, match=f"cannot count .*({operator})"):
            macs_of(function)
        with pytest.raises(CountError, match=f"cannot count .*({operator})"), torch.no_grad():
            count_macs_quick(lambda: function(TOKENS))

    def test_refused_operator_is_located(self) -> None:
        model = nn.Sequential(nn.Identity(), Calls(lambda x: torch.linalg.multi_dot([x[0], x[0].mT, x[0]])))
        with pytest.raises(CountError, match=r"cannot count aten::linalg_multi_dot \(in 1\)"):
            count_macs(model, TOKENS)

    def test_custom_function_is_refused(self) -> None:
        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx: object, x: Tensor) -> Tensor:
                return x * 2

        with pytest.raises(CountError, match="Double"):
            macs_of(Double.apply)

    def test_einsum_of_three_is_refused(self) -> None:
        with pytest.raises(CountError, match="3 operands"):
            macs_of(lambda x: torch.einsum("bnc,bmc,bmd->bnd", x, x, x))

    def test_disagreement(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(operators.TRACE_HANDLES, "aten::linear", lambda inputs, outputs: Counter(linear=1))
        with pytest.raises(CountError, match=r"fvcore counts 2 MACs.*FlopCounterMode 1,280; in 0 1 and 640; in 1 1"):
            count_macs(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), TOKENS)

    def test_disagreement_over_a_handle_gone_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(operators.TRACE_HANDLES, "aten::scaled_dot_product_attention")
        with pytest.raises(CountError, match="cannot count aten::scaled_dot_product_attention"):
            macs_of(OPERATORS["sdpa"][0])

    def test_threads(self) -> None:
        threads = torch.get_num_threads()
        try:
            counts = []
            for number in (1, 2):
                torch.set_num_threads(number)
                counts.append(macs_of(OPERATORS["sdpa_masked"][0]))
        finally:
            torch.set_num_threads(threads)
        assert counts[0] == counts[1]
