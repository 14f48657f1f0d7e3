"""Another set of classes gets a new head, wherever the model keeps its head; nothing else changes."""

from __future__ import annotations

import warnings

import datasets
import pytest
import timm
import torch
from torch import nn

import ltm_retrofit as ltm
from ltm_retrofit.errors import AlreadyRetrofitted, DataError
from ltm_retrofit.finding.example import logits_of, prepare_example, run
from ltm_retrofit.tuning.classes import check_data, check_same_classes, count_classes, set_classes

NAMES = ["ant", "bee", "cat"]
HEADS = {
    "timm-vit": {"head"},
    "timm-vit-avg-qknorm": {"head"},
    "timm-deit": {"head", "head_dist"},
    "timm-dinov2": {"head"},
    "timm-clip": {"head"},
    "hf-vit": {"classifier"},
    "hf-deit": {"classifier"},
    "hf-deit-teacher": {"cls_classifier", "distillation_classifier"},
    "hf-dinov2": {"classifier"},
}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found = logits_of(run(model, prepare_example(model, None)))
    assert found is not None
    return found


@pytest.mark.parametrize("name", HEADS)
def test_new_head_and_nothing_else(name: str, build) -> None:
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert set_classes(model, NAMES) == "new"
    after = model.state_dict()
    changed = {key.rsplit(".", 1)[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == HEADS[name] and set(before) == set(after)
    assert logits(model).shape == (1, 3)
    assert count_classes(model) == 3
    assert not model.training and not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", HEADS)
def test_as_many_classes_as_before_keeps_the_head(name: str, build) -> None:
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert set_classes(model, [str(index) for index in range(7)]) is None
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [name for name in HEADS if name.startswith("hf-")])
def test_hf_config_knows_the_classes_and_survives_a_save(name: str, build, tmp_path) -> None:
    model = build(name)
    set_classes(model, NAMES)
    assert model.config.num_labels == 3
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id == {"ant": 0, "bee": 1, "cat": 2}
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert again.config.id2label == dict(enumerate(NAMES))


def test_hf_loss_counts_the_new_classes(build) -> None:
    model = build("hf-vit")
    set_classes(model, NAMES)
    loss = model(pixel_values=torch.zeros(2, 3, 32, 32), labels=torch.tensor([0, 2])).loss
    assert torch.isfinite(loss)


@pytest.mark.parametrize("name", ["timm-vit", "timm-deit", "hf-vit"])
def test_the_head_is_of_the_models_dtype(name: str, build) -> None:
    model = build(name).double()
    set_classes(model, NAMES)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert logits(model).dtype == torch.float64


def test_head_without_bias_stays_without(build) -> None:
    model = build("hf-vit")
    model.classifier = nn.Linear(48, 7, bias=False)
    set_classes(model, NAMES)
    assert model.classifier.bias is None and model.classifier.weight.shape == (3, 48)


def test_a_model_with_a_new_head_converts_and_counts_its_classes(build) -> None:
    model = build("hf-deit-teacher")
    set_classes(model, NAMES)
    plan = ltm.get_plan(ltm.retrofit(model))
    assert plan.classes == 3 and set(plan.readouts) == HEADS["hf-deit-teacher"]


def test_a_tower_has_no_head_to_replace(build) -> None:
    model = build("hf-clip")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(DataError, match="CLIPVisionModel has no linear classifier to replace"):
        set_classes(model, NAMES)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_converted_model_keeps_its_classes(converted) -> None:
    model = converted("timm-vit")
    with pytest.raises(AlreadyRetrofitted, match="restore it first"):
        set_classes(model, NAMES)
    assert logits(model).shape == (1, 7)
    assert set_classes(ltm.restore(model), NAMES) == "new"


# -------------------------------------------------------------------------------------------------- classes by name


@pytest.fixture
def named(build):
    """Two models that know their seven classes by name."""
    words = ["ant", "bee", "cat, house cat", "dog", "Eel_Fish", "crane, bird", "crane, machine"]
    hf, timm_vit = build("hf-vit"), build("timm-vit")
    hf.config.id2label = dict(enumerate(words))
    timm_vit.pretrained_cfg = {**timm_vit.pretrained_cfg, "label_names": words}
    return {"hf-vit": hf, "timm-vit": timm_vit}


@pytest.mark.parametrize("name", ["hf-vit", "timm-vit"])
@pytest.mark.parametrize("places", [[3, 0], [4, 1, 0], [1, 0, 3, 4]], ids=str)
def test_a_part_of_the_known_classes_keeps_their_rows(name: str, places: list[int], named) -> None:
    model, words = named[name], ["ant", "BEE", "?", "dog", "eel fish"]
    before = logits(model)
    assert set_classes(model, [words[place] for place in places]) == "by name"
    assert torch.allclose(logits(model), before[:, places], atol=1e-6)
    assert count_classes(model) == len(places)


@pytest.mark.parametrize("name", ["hf-vit", "timm-vit"])
def test_classes_without_names_move_nothing(name: str, named) -> None:
    model = named[name]
    digits = [str(6 - index) for index in range(7)]  # a model that calls its classes by numbers, in its own order
    if name == "hf-vit":
        model.config.id2label = dict(enumerate(digits))
    else:
        model.pretrained_cfg = {**model.pretrained_cfg, "label_names": digits}
    before = logits(model)
    assert set_classes(model, 7) is None
    assert torch.equal(logits(model), before)
    assert set_classes(model, 3) == "new"
    assert count_classes(model) == 3


def test_synonyms_are_known_and_ambiguous_ones_are_not(named) -> None:
    model = named["hf-vit"]
    before = logits(model)
    assert set_classes(model, ["house cat", "bird"]) == "by name"
    assert torch.allclose(logits(model), before[:, [2, 5]], atol=1e-6)
    assert set_classes(named["timm-vit"], ["ant", "crane"]) == "new", "two classes are called crane"


def test_all_classes_in_another_order_are_put_in_order(named) -> None:
    model = named["timm-vit"]
    before, words = logits(model), model.pretrained_cfg["label_names"]
    assert set_classes(model, words) is None
    assert set_classes(model, words[::-1]) == "by name"
    assert torch.allclose(logits(model), before.flip(1), atol=1e-6)


def test_as_many_classes_of_which_some_are_known_elsewhere(named) -> None:
    before = logits(named["hf-vit"])
    with pytest.raises(DataError, match=r"class 0 is 'bee', which ViTForImage\w+ knows as its class 1"):
        set_classes(named["hf-vit"], ["bee", "u", "v", "w", "x", "y", "z"])
    assert torch.equal(logits(named["hf-vit"]), before)


def test_a_class_of_another_name_in_the_same_place_is_named(pictures) -> None:
    """A folder `coat` in the place of `dress` was counted as dresses without a word."""
    model = ltm.load_model("digits_vit")
    data = pictures(20, classes=10)
    names = [*"012345678", "nine"]
    data = data.cast_column("label", datasets.ClassLabel(names=names))
    with pytest.warns(UserWarning, match="VisionTransformer knows no class 'nine': counted as its class of the same"):
        check_data(model, data, "test", 10)
    names[8], names[7] = "7", "eight"
    with pytest.raises(DataError, match=r"knows as its class 7, and it does not know 'eight', 'nine': give"):
        check_data(model, data.cast_column("label", datasets.ClassLabel(names=names)), "test", 10)


def test_as_many_classes_of_other_names_keep_the_head_and_are_named(named) -> None:
    model, before = named["hf-vit"], logits(named["hf-vit"])
    with pytest.warns(UserWarning, match="under names .* not know: .* the data's 't', class 0, is taken for its 'ant'"):
        assert set_classes(model, list("tuvwxyz")) is None
    assert torch.equal(logits(model), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set_classes(model, [str(index) for index in range(7)]) is None, "numbers are no names"


def test_imagenets_classes_are_known_by_synset_and_by_word() -> None:
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=24, num_heads=2, depth=4).eval()
    before = logits(model)
    assert set_classes(model, ["n01440764", "golden retriever", "Tinca tinca"]) == "new", "one of them twice"
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=24, num_heads=2, depth=4).eval()
    before = logits(model)
    assert set_classes(model, ["golden retriever", "n01440764"]) == "by name"
    assert torch.allclose(logits(model), before[:, [207, 0]], atol=1e-6)


def test_what_else_a_classifier_holds_stays() -> None:
    words = [f"word {index}" for index in range(7)]
    model = timm.create_model("levit_128s", num_classes=7).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_mean)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": words}
    before = logits(model)
    assert set_classes(model, words[::-1]) == "by name"
    torch.testing.assert_close(logits(model), before.flip(1))
    assert set_classes(model, ["x", "y"]) == "new" and set_classes(model, ["x", "y"]) is None


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ([*"abcdefghijkl"[:-1], "z"], "only the training split has 'l' and only the test split has 'z'"),
        ([*"bacdefghijkl"], "they come in another order, class 0 is 'a' in one and 'b' in the other"),
        ([*"abcdef"], "only the training split has 'g', 'h', 'i', 'j', 'k', 'l'"),
        (None, "test labels are numbers without names"),
    ],
    ids=["late", "order", "fewer", "numbers"],
)
def test_what_two_lists_of_classes_differ_in_is_said(second: list[str] | None, said: str) -> None:
    """Lists that begin alike were cut to the same text."""

    def table(names: list[str] | None) -> datasets.Dataset:
        label = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
        return datasets.Dataset.from_dict({"label": [0]}, features=datasets.Features({"label": label}))

    for split in ("training", "validation"):
        named = said.replace("training", split)
        with pytest.raises(DataError, match=f"one label would mean two things: {named}\\. Give both"):
            check_same_classes(table([*"abcdefghijkl"]), table(second), split)
    check_same_classes(table([*"ab"]), table([*"ab"]))
