"""The registry of merging methods: what an entry builds, what it counts, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ltm_retrofit.errors import CountError, RecipeError
from ltm_retrofit.macs import count_macs_quick
from ltm_retrofit.merging import methods
from ltm_retrofit.merging.methods import Keys, Method, Place, get_method, method_names, register_method
from ltm_retrofit.merging.pool import grid_overlaps
from ltm_retrofit.merging.rounds import leaving_in
from ltm_retrofit.merging.tokens import Mask, dense_unmerge_macs, merge_by
from ltm_retrofit.scopes.base import make_mask

torch.set_num_threads(1)
OURS = ("ltm", "tome", "pool", "slice")


def flow(dim: int, key_dim: int, n: int, p: int, prefix: int, classes: int, **more: int) -> Place:
    return Place("FLOW", dim, key_dim, n, p, prefix, classes, **more)


def grid(dim: int, key_dim: int, before: tuple[int, int], after: tuple[int, int], classes: int) -> Place:
    n, p = before[0] * before[1], after[0] * after[1]
    return Place("GRID", dim, key_dim, n, p, classes=classes, grid=before, grid_out=after)


def local(dim: int, key_dim: int, n: int, p: int, classes: int, cells: int, width: int) -> Place:
    return Place("LOCAL", dim, key_dim, n, p, classes=classes, cells=cells, width=width)


#: saved plans hold sums of these, so they never change while a method's version stays; None: nothing is brought back
COUNTED = [
    ("ltm", flow(384, 64, 197, 138, 1, 1000), 3_687_936, 0),
    ("ltm", flow(384, 64, 197, 138, 1, 1000, step=True), 4_015_616, 0),
    ("ltm", flow(384, 64, 197, 138, 1, 1000, rounds=3), 8_997_888, 0),
    ("ltm", flow(384, 64, 197, 40, 1, 1000), 4_840_320, 0),
    ("ltm", flow(768, 64, 201, 120, 5, 10, rounds=2), 11_988_480, 0),
    ("ltm", local(96, 16, 64, 30, 1000, 49, 384), 6_021_120, 0),
    ("ltm", local(144, 16, 16, 3, 7, 4, 288), 48_384, 0),
    ("ltm", grid(128, 16, (14, 14), (11, 8), 1000), 515_456, None),
    ("ltm", grid(64, 16, (8, 8), (6, 6), 7), 77_056, None),
    ("tome", flow(384, 64, 197, 138, 1, 1000), 5_431_552, 2_220_288),
    ("tome", flow(192, 16, 50, 12, 0, 7), 160_000, 72_960),
    ("tome", local(96, 16, 64, 30, 1000, 49, 384), 5_541_312, 14_074_368),
    ("pool", flow(384, 64, 197, 138, 1, 1000), 10_466_610, 10_439_424),
    ("pool", local(96, 16, 64, 30, 1000, 49, 384), 9_125_760, 36_126_720),
    ("pool", grid(128, 16, (14, 14), (11, 8), 1000), 101_376, None),
    ("slice", flow(384, 64, 197, 138, 1, 1000), 0, 22_656),
    ("slice", local(96, 16, 64, 30, 1000, 49, 384), 0, 639_744),
    ("slice", grid(128, 16, (14, 14), (11, 8), 1000), 0, None),
]


@pytest.mark.parametrize("name, place, macs, unmerge_macs", COUNTED)
def test_counts_of_saved_plans_stay(name, place, macs, unmerge_macs):
    assert get_method(name).macs(place) == macs
    assert unmerge_macs is None or get_method(name).unmerge_macs(place) == unmerge_macs


@pytest.mark.parametrize("place", [place for name, place, _, _ in COUNTED if name == "ltm"], ids=lambda p: p.scope)
def test_counts_of_the_learnable_mask_are_the_formula(place):
    d, key, a, c = place.dim, place.key_dim, place.clusters, place.classes
    patches = place.tokens_in - place.prefix
    step = 2 * a * d + 2 * a * c + place.cells * 2 * patches * d if place.step else 0
    if place.grid is not None:
        pairs = grid_overlaps(place.grid, place.grid_out)[0].numel()
        assert get_method("ltm").macs(place) == patches * d * key + pairs * key + pairs * d + step
        return
    compared = 0
    for leave in leaving_in(place.tokens_in, place.tokens_out, place.rounds, place.prefix):
        compared += (patches // 2) * -(-patches // 2)
        patches -= leave
    assert get_method("ltm").macs(place) == place.cells * compared * d + step
    assert get_method("ltm").unmerge_macs(place) == 0


def keys_of(place: Place, bias: bool = True) -> Keys:
    torch.manual_seed(0)
    return Keys(torch.randn(place.key_dim, place.dim), torch.randn(place.key_dim) if bias else None)


SMALL = [
    flow(24, 8, 17, 12, 1, 5),
    flow(24, 8, 26, 8, 5, 5, rounds=3, step=True),
    local(24, 8, 16, 7, 5, 3, 36),
    grid(24, 8, (6, 5), (4, 4), 5),
]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("place", SMALL, ids=["flow", "flow-beyond-half", "local", "grid"])
def test_counts_are_those_of_the_mask_that_is_built(name, place):
    method = get_method(name)
    if place.scope not in method.scopes:
        pytest.skip(f"{name} does not serve {place.scope}")
    mask, keys = method.build(place, keys_of(place, bias=place.scope == "FLOW")).eval(), keys_of(place)
    tokens = torch.randn(place.cells, place.tokens_in, place.dim)
    wide = torch.randn(place.cells, place.tokens_out, place.width or place.dim)
    seen = []

    def merge() -> None:
        if place.grid is not None:
            seen.append(mask(tokens, place.grid)[2])
        else:
            key = keys if mask.wants_key and place.scope == "FLOW" else None
            seen.append(mask(tokens, tokens, None, key, place.cells).merge)

    with torch.no_grad():
        assert count_macs_quick(merge) == method.macs(place)
        assert count_macs_quick(lambda: seen[0].assignment.unmerge(wide)) == method.unmerge_macs(place)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("step", [True, False], ids=["step", "no-step"])
@pytest.mark.parametrize("place", [SMALL[0], SMALL[2], SMALL[3]], ids=["flow", "local", "grid"])
def test_a_learnable_mask_starts_neutral_and_on_a_map_from_the_hosts_keys(place, bias, dtype, step):
    keys = keys_of(place, bias)
    mask = get_method("ltm").build(replace(place, dtype=dtype, step=step), keys)
    dtype = dtype or torch.float32
    if place.grid is None:
        assert torch.equal(mask.weight, torch.ones(place.dim, dtype=dtype))
    else:
        assert torch.equal(mask.key.weight, keys.weight.to(dtype)) and mask.alpha == 0
    assert all(parameter.dtype == dtype and parameter.requires_grad for parameter in mask.parameters())
    assert mask.learned().keys() == {"weight_std" if place.grid is None else "alpha"} | ({"eta"} if step else set())
    if step:
        assert mask.statistics.centroids.shape == (64, place.dim)
        assert mask.statistics.counts.shape == (64, place.classes) and mask.learned()["eta"] == 0
    else:
        assert mask.statistics is None and not dict(mask.named_buffers()).keys() - {"index", "share"}


def test_a_host_without_classes_gets_statistics_of_one():
    place = replace(SMALL[0], step=True)
    mask = get_method("ltm").build(replace(place, classes=0), keys_of(place))
    assert mask.statistics.counts.shape == (64, 1)
    assert get_method("ltm").macs(replace(place, classes=0)) == get_method("ltm").macs(replace(place, classes=1))


def test_tome_follows_the_blocks_keys_and_has_keys_of_its_own_for_an_mlp():
    tome, keys = get_method("tome"), keys_of(SMALL[0])
    there, alone = (tome.build(place, keys) for place in (SMALL[0], SMALL[2]))
    assert there.wants_key and there.own_key is None and not there.state_dict()
    assert torch.equal(alone.own_key, keys.weight) and alone.state_dict().keys() == {"own_key"}


@pytest.mark.parametrize("name", ["tome", "pool", "slice"])
def test_masks_that_do_not_learn_say_so(name):
    mask = get_method(name).build(SMALL[0], keys_of(SMALL[0]))
    assert isinstance(mask, Mask) and mask.statistics is None and mask.learned() == {}
    assert not list(mask.parameters()) and not mask.state_dict()


@pytest.mark.parametrize("name", ["ltm", "tome", "pool"])
def test_counts_that_cannot_be_are_refused_with_the_range(name):
    for n, p in ((17, 1), (17, 18)):
        with pytest.raises(CountError, match=f"cannot merge 17 tokens, 1 of them prefix tokens, into {p}: choose 2 to"):
            get_method(name).macs(flow(24, 8, n, p, 1, 5))


def test_a_slice_may_leave_prefix_tokens_alone_but_not_cut_them():
    macs = get_method("slice").macs
    assert macs(flow(24, 8, 17, 5, 5, 7)) == 0
    with pytest.raises(CountError, match=r"slicing to 4 tokens would cut prefix tokens \(5\)"):
        macs(flow(24, 8, 17, 4, 5, 7))
    with pytest.raises(CountError, match="slicing to 0 tokens"):
        macs(flow(24, 8, 17, 0, 0, 7))


# ------------------------------------------------------------------------------------------------------- the registry


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_REGISTERED", {})


class Runs(Mask):
    """Each merged token is the mean of a run of neighbours."""

    def forward(self, inner: Tensor, tokens: Tensor, sizes: Tensor | None, *_: object, **__: object):
        n, first = tokens.shape[1], self.prefix
        p = self.kept_at(n)
        goes = torch.cat([torch.arange(first), first + torch.arange(n - first) * (p - first) // (n - first)])
        return merge_by(F.one_hot(goes, p).float(), tokens, sizes)


def runs(name: str = "runs", version: int = 1, scopes: tuple[str, ...] = ("FLOW", "LOCAL")) -> Method:
    return Method(name, version, scopes, build_runs, count_runs, dense_unmerge_macs)


def build_runs(place: Place, keys: Keys) -> Mask:
    return Runs(place.tokens_in, place.tokens_out, place.prefix)


def count_runs(place: Place) -> int:
    return place.cells * place.tokens_in * place.tokens_out * (place.dim + 1)


def test_a_method_of_ones_own_stands_beside_the_others(registry):
    assert method_names() == OURS
    register_method(runs())
    register_method(runs())  # a cell of a notebook that runs twice
    assert method_names() == (*OURS, "runs") and get_method("runs") == runs()
    for name, other in (("runs", runs(version=2)), ("ltm", runs("ltm"))):
        with pytest.raises(RecipeError, match=f"a method '{name}' is registered already: give yours another name"):
            register_method(other)


def test_a_mask_that_says_its_assignment_alone_merges_counts_and_unmerges():
    place = flow(24, 8, 17, 9, 1, 5)
    mask, tokens = runs().build(place, keys_of(place)), torch.randn(2, 17, 24)
    assert count_macs_quick(lambda: mask(tokens[:1], tokens[:1], None)) == runs().macs(place)
    sizes = torch.randint(1, 4, (2, 17)).float()
    for given in (None, sizes):
        merged = mask(tokens, tokens, given)
        weigh = torch.ones(2, 17) if given is None else given
        pairs = (tokens * weigh[..., None])[:, 1:].unflatten(1, (8, 2)).sum(2)
        total = weigh[:, 1:].unflatten(1, (8, 2)).sum(2)
        torch.testing.assert_close(merged.tokens[:, 1:], pairs / total[..., None])
        torch.testing.assert_close(merged.sizes[:, 1:], total)
        assert torch.equal(merged.tokens[:, :1], tokens[:, :1])
    back = merged.merge.assignment.unmerge(merged.tokens)
    assert torch.equal(back[:, 1::2], back[:, 2::2]) and merged.merge.descriptor is None
    assert mask(tokens[:, :12], tokens[:, :12], None).tokens.shape[1] == 1 + round(11 * 8 / 16)


def test_an_assignment_may_differ_from_image_to_image():
    matrix = torch.stack([torch.eye(3)[[0, 1, 1, 2]], torch.eye(3)[[0, 0, 1, 2]]])
    tokens = torch.randn(2, 4, 5)
    merged = merge_by(matrix, tokens, None)
    torch.testing.assert_close(merged.tokens[0, 1], tokens[0, 1:3].mean(0))
    torch.testing.assert_close(merged.tokens[1, 0], tokens[1, :2].mean(0))
    assert merged.merge.assignment.whole == 4 and torch.equal(merged.merge.assignment.dense(), matrix)
    assert merged.merge.assignment.kept.tolist() == [[0, 1, 3], [0, 2, 3]]


@pytest.mark.parametrize("scopes", [(), "FLOW", ("FLOW", "local")], ids=str)
def test_a_method_of_no_known_scope_is_refused(scopes):
    with pytest.raises(RecipeError, match=r"serves the scopes .*: give a tuple of FLOW, GRID, LOCAL"):
        runs(scopes=scopes)


def test_an_unknown_method_is_refused_with_the_nearest_name(registry):
    with pytest.raises(
        RecipeError, match="method 'tomee' is not registered; did you mean 'tome'\\? known: 'ltm', 'tome'"
    ):
        get_method("tomee")
    with pytest.raises(RecipeError, match="method 'xyz' is not registered; known: 'ltm'"):
        get_method("xyz")


def test_a_mask_lives_where_its_keys_do_also_beside_a_module_without_parameters() -> None:
    keys = Keys(torch.empty(8, 16, device="meta"))
    place = Place("GRID", 16, 8, 16, 4, grid=(4, 4), grid_out=(2, 2))
    mask = make_mask("ltm", place, keys, torch.nn.Identity())
    assert {value.device.type for value in mask.parameters()} == {"meta"}
