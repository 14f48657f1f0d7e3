"""A method of one's own: its mask, its costs and its entry are all that it takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from pieces import batches
from torch import Tensor, nn

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import learns, masks_of
from ltm_retrofit.finding.example import tensors_of
from ltm_retrofit.macs import count_macs
from ltm_retrofit.merging import methods
from ltm_retrofit.merging.methods import Keys, Method, Place, register_method
from ltm_retrofit.merging.statistics import Statistics
from ltm_retrofit.merging.tokens import DenseAssignment, Merge, Merged
from ltm_retrofit.plan import MergePlan

torch.set_num_threads(1)


# ----------------------------------------------------------------------------------------- all that a method is made of


class Stretches(nn.Module):
    """Each output token is a learned scale times the mean of neighbouring tokens."""

    def __init__(self, place: Place, keys: Keys) -> None:
        super().__init__()
        patches, prefix = place.tokens_in - place.prefix, place.prefix
        stretch = torch.arange(patches) * (place.tokens_out - prefix) // patches
        target = torch.cat([torch.arange(prefix), prefix + stretch])
        self.register_buffer("matrix", torch.eye(place.tokens_out)[target], persistent=False)  # W (N, P)
        self.scale = nn.Parameter(torch.ones(place.dim))
        self.statistics = Statistics(place.dim, place.classes, place.clusters)

    def forward(
        self, inner: Tensor, z: Tensor, sizes: Tensor | None, key: object = None, cells: int = 1, padded: bool = False
    ) -> Merged:
        sizes = z.new_ones(z.shape[:2]) if sizes is None else sizes
        weights = sizes.unsqueeze(-1) * self.matrix  # (B, N, P)
        new_sizes = weights.sum(dim=1)
        merged = self.scale * torch.matmul((weights / new_sizes.unsqueeze(1)).transpose(1, 2), z)
        descriptor = merged.mean(dim=1).unflatten(0, (-1, cells)).mean(dim=1)
        kept = self.matrix.argmax(dim=0).expand(len(z), -1)
        return Merged(merged, new_sizes, Merge(DenseAssignment(kept, self.matrix), descriptor))


def macs(place: Place) -> int:
    return place.cells * place.tokens_in * place.tokens_out * place.dim


def unmerge_macs(place: Place) -> int:
    return place.cells * place.tokens_in * place.tokens_out * (place.width or place.dim)


METHOD = Method("stretches", 1, ("FLOW", "LOCAL"), Stretches, macs, unmerge_macs)


# ----------------------------------------------------------------------------------------------------- what it can do


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(methods, "_REGISTERED", {})
    register_method(METHOD)
    yield


def model_of(**options: object) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", **sizes, **options).eval()


IMAGES = batches(1)[0][0]


@pytest.mark.parametrize("options", [{"scope": "FLOW"}, {"scope": "FLOW", "output_tokens": "full"}, {"scope": "LOCAL"}])
def test_it_goes_all_the_way(options: dict[str, str], tmp_path: Path) -> None:
    model = model_of()
    before = model(IMAGES)
    ltm.retrofit(model, ltm.LTMConfig(flops=0.8, method="stretches", **options))
    plan, masks = ltm.get_plan(model), masks_of(model)
    assert {row.scope for row in plan.rows} == {options["scope"]} and plan.method_version == 1
    assert all(type(mask) is Stretches for mask in masks.values()) and all(map(learns, masks.values()))
    assert count_macs(model, IMAGES[:1]).total == plan.macs
    assert len(ltm.show_merges(model, IMAGES[:1]).axes) == 1 + len(masks)

    ltm.finetune(model, batches(2), config=ltm.TrainConfig(epochs=1, batch_size=7))
    assert any(not torch.equal(mask.scale, torch.ones(48)) for mask in masks.values())
    with ltm.trace(model.train()) as traced:
        model(IMAGES)
        assert float(ltm.bound_loss(traced, torch.zeros(len(IMAGES), dtype=torch.int64)).detach()) == 0
    tuned = model.eval()(IMAGES)
    assert not torch.equal(tuned, before)

    ltm.save_pretrained(model, tmp_path)
    again = ltm.from_pretrained(tmp_path)
    assert torch.equal(again(IMAGES), tuned) and ltm.get_plan(again) == ltm.get_plan(model)
    with ltm.disabled(model):
        original = model(IMAGES)
    ltm.restore(model)
    assert torch.equal(model(IMAGES), original) and type(model.blocks[0].forward).__name__ == "method"


@pytest.mark.parametrize("scope", ["FLOW", "LOCAL"])
@pytest.mark.parametrize("name", ["timm-vit-avg-qknorm", "hf-vit", "hf-dinov2"])
def test_other_hosts_convert_count_and_come_back(
    name: str, scope: str, build: Callable[[str], nn.Module], images: Tensor, tmp_path: Path
) -> None:
    host, model = build(name), build(name)
    share = 0.7 if scope == "FLOW" else 0.9
    plan = ltm.get_plan(ltm.retrofit(model, ltm.LTMConfig(flops=share, method="stretches", scope=scope)))
    assert {row.scope for row in plan.rows} == {scope} and plan.share <= share
    assert count_macs(model, images[:1]).total == plan.macs
    ltm.save_pretrained(model, tmp_path)
    loaded = ltm.from_pretrained(tmp_path)
    assert ltm.get_plan(loaded) == plan
    with torch.no_grad():
        merged = tensors_of(model(images))[0]
        assert torch.equal(tensors_of(loaded(images))[0], merged)
        with ltm.disabled(model):
            original = tensors_of(model(images))[0]
        assert torch.equal(original, tensors_of(host(images))[0]) and not torch.equal(original, merged)


def test_where_it_does_not_serve_it_is_refused_and_others_are_named() -> None:
    sizes = {"widths": (8, 8, 16, 32, 32), "depths": (1, 1, 1, 2, 2), "head_dim": 8, "head_widths": (32, 32)}
    model = timm.create_model("efficientvit_b0", num_classes=7, **sizes).eval()
    config = ltm.LTMConfig(flops=0.8, method="stretches", scope="GRID")
    with pytest.raises(ltm.RecipeError, match=r"'stretches' does not serve scope GRID.*use method='ltm' or 'pool'"):
        ltm.retrofit(model, config, torch.randn(1, 3, 128, 128))
    assert not ltm.is_retrofitted(model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = ltm.retrofit(model_of(), ltm.LTMConfig(flops=0.8, method="stretches"))
    ltm.save_pretrained(model, tmp_path)
    return tmp_path


def test_a_folder_of_a_method_that_is_not_registered_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_REGISTERED", {})
    base = model_of()
    with pytest.raises(ltm.BaseMismatch, match=r"'stretches', which is not registered: call .*register_method"):
        ltm.from_pretrained(folder, base=base)
    assert not ltm.is_retrofitted(base)
    with pytest.raises(ltm.RecipeError, match="'stretches'"):
        ltm.LTMConfig(flops=0.8, method="stretches")


def other_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_REGISTERED", {})
    register_method(Method("stretches", 2, ("FLOW", "LOCAL"), Stretches, macs, unmerge_macs))


def test_a_folder_of_another_version_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_version(monkeypatch)
    base = model_of()
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    with pytest.raises(ltm.BaseMismatch, match=r"saved with version 1 of method 'stretches', this .* has 2: convert"):
        ltm.from_pretrained(folder, base=base)
    assert all(torch.equal(value, weights[key]) for key, value in base.state_dict().items())


def test_a_plan_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    plan = ltm.make_plan(ltm.find_sites(model), ltm.LTMConfig(flops=0.8, method="stretches"))
    other_version(monkeypatch)
    with pytest.raises(ltm.BaseMismatch, match="saved with version 1"):
        ltm.retrofit(model, plan=plan)
    with pytest.raises(ltm.BaseMismatch, match="saved with version 1"):
        MergePlan.from_dict(plan.to_dict())
    assert not ltm.is_retrofitted(model)


def test_a_folder_that_names_no_version_is_of_the_first(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    assert config["plan"].pop("method_version") == 1
    file.write_text(json.dumps(config))
    assert ltm.get_plan(ltm.from_pretrained(folder)).method_version == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda m: m._replace(tokens=m.tokens[:, :-1]), r"should be \(45, 45, 65\), got \(44, 45, 65\)"),
        (lambda m: m._replace(sizes=m.sizes[:, :-1]), r"got \(45, 44, 65\)"),
        (lambda m: m._replace(tokens=m.tokens[..., :-1]), r"tokens of shape \(1, 45, 47\)"),
        (lambda m: m._replace(tokens=m.tokens.flip(1)), "changed the first 1 tokens, or moved them"),
        (lambda m: m._replace(merge=Merge(DenseAssignment(m.merge.assignment.kept, torch.ones(3, 45)))), "45, 3"),
    ],
    ids=["too few", "sizes", "narrower", "prefix moved", "assignment"],
)
def test_a_mask_that_returns_something_else_is_refused(wrong: Callable[[Merged], Merged], said: str) -> None:
    class Wrong(Stretches):
        def forward(self, *args: object, **more: object) -> Merged:
            return wrong(super().forward(*args, **more))

    register_method(Method("wrong", 1, ("FLOW",), Wrong, macs, unmerge_macs))
    model = model_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ltm.CountError, match=f"(?s)method 'wrong'.*{said}"):
        ltm.retrofit(model, ltm.LTMConfig(tokens=(45,), sites=("blocks.1",), method="wrong"))
    assert not ltm.is_retrofitted(model) and before.keys() == model.state_dict().keys()


def test_an_entry_is_short_and_its_name_is_its_own() -> None:
    with pytest.raises(ltm.RecipeError, match="'stretches' is registered already"):
        register_method(Method("stretches", 1, ("FLOW",), Stretches, macs, unmerge_macs))
    with pytest.raises(ltm.RecipeError, match="'ltm' is registered already"):
        register_method(Method("ltm", 1, ("FLOW",), Stretches, macs, unmerge_macs))
    register_method(METHOD)  # the same one again, as a module that is reloaded does
    lines = Path(__file__).read_text().split("# ---")[1].splitlines()
    assert sum(bool(line.strip()) for line in lines) < 40
