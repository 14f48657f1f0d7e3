"""record → search each scope → choose: the whole walk, one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import NoAttentionError, UnsupportedBlock
from ltm_retrofit.finding.example import Example, fixed_of, image_sizes, prepare_example, sizes_said
from ltm_retrofit.finding.sites import AttentionSite, Found, Sites
from ltm_retrofit.finding.walk import WHOLE, Walk
from ltm_retrofit.scopes import SCOPES
from ltm_retrofit.scopes.flow import FLOW
from ltm_retrofit.scopes.flow.find import find_ending
from ltm_retrofit.scopes.grid.find import passes_maps
from ltm_retrofit.undisturbed import undisturbed, without_autocast


@without_autocast()
def find_sites(model: nn.Module, example: Example | None = None) -> Sites:
    """Find the blocks in which tokens may be merged, and prove it. Touches nothing.

    Args:
        model: any ``nn.Module``. Where its parameters are on the meta device, the proofs run on a twin with random
            values, in which runs of equal blocks are cut short; `retrofit` proves again on the real ones.
        example: a tensor or a dict of keyword arguments, of any batch size. Left out, it is made of the size that the
            image processor saved beside the checkpoint makes, else of what the model says of its input.

    Returns:
        The sites in depth order, each attention in the best scope that the proofs allow; ``.excluded`` names every
        other attention with its reason, ``.narrowed`` says of the others why they are not in a better scope.

    Raises:
        NoAttentionError: where the model attends nowhere.
        ExampleError: where there is no example, or the model cannot be run on it.
        UnsupportedBlock: under ``torch.inference_mode()``, or where the model is quantized.

    Example:
        >>> import timm
        >>> import ltm_retrofit as ltm
        >>> sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
        >>> sites = ltm.find_sites(timm.create_model("vit_tiny_patch16_224", num_classes=7, **sizes))
        >>> [(site.block, site.scope.value, site.layout.tokens) for site in sites][:2]
        [('blocks.0', 'FLOW', 17), ('blocks.1', 'FLOW', 17)]
    """
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise UnsupportedBlock(
            f"this {type(model).__name__} is looked at, or was built, under torch.inference_mode(), whose tensors no "
            "gradient can go through, and where keys come from is read off gradients: build and convert it outside of "
            "inference_mode; torch.no_grad() does no harm"
        )
    if (low := _quantized(model)) is not None:
        raise UnsupportedBlock(
            f"{low} of this {type(model).__name__} is quantized already, which proofs and counters cannot look into: "
            "convert first, and quantize the converted model"
        )
    base = identify(model)
    said = sizes_said(model)
    walk = Walk.of(model, prepare_example(model, example))
    if example is not None and len(images := image_sizes(walk.example)) == 1:
        said = {"example": images[0], **said}
    if walk.removed:  # maps are merged in whole models only; and a short twin must see what the full model sees
        maps = walk.on_meta_macs < WHOLE and passes_maps(walk)
        walk = walk.whole() if maps or not walk.faithful() else walk
    return replace(_search(walk, base), sizes_said=said)


def _quantized(model: nn.Module) -> str | None:
    """Return the first module that computes in int8 or the like."""
    for name, module in model.named_modules():
        kinds = [type(module), *(type(parameter) for parameter in module.parameters(recurse=False))]
        if any(kind.__module__.startswith(("torch.ao.nn.quantized", "torchao.")) for kind in kinds):
            return str(name)
    return None


def identify(model: nn.Module) -> dict[str, str]:
    """Say which library a model comes from, its class and, where it knows it, its architecture's name."""
    library = type(model).__module__.partition(".")[0]
    named = {"library": library, "class": type(model).__name__}
    declared = getattr(model, "pretrained_cfg", None)
    if library == "timm" and isinstance(declared, Mapping) and declared.get("architecture"):
        named["architecture"] = str(declared["architecture"])
    if library == "transformers":
        named["architecture"] = str(getattr(getattr(model, "config", None), "model_type", ""))
    return named


def _search(walk: Walk, base: dict[str, str]) -> Sites:
    """Ask each scope for its sites, and choose."""
    attended = walk.recording.attended
    if not attended:
        raise NoAttentionError(
            f"{type(walk.model).__name__} attends nowhere: no scaled dot-product, no softmax of a product and no "
            "kernelised attention was seen in a forward pass of the example. Token merging needs a transformer "
            "with attention blocks"
        )
    with undisturbed(walk.model), torch.no_grad():
        flow = FLOW.find(walk)
        walk.settled = set(flow.sites)
        ending = find_ending(walk, flow)
        found = [flow, *(scope.find(walk) for scope in SCOPES if scope is not FLOW)]
        macs = walk.macs
    every = [site for scope in found for several in scope.sites.values() for site in several]
    if walk.removed and any(map(walk.spans_blocks, every)):
        return _search(walk.whole(), base)
    best, other, excluded = _choose(walk, found)
    counts = [walk.stands_for(one.owner) for one in attended]  # a block of a twin stands for those that were cut away
    missed = sum(count for one, count in zip(attended, counts, strict=True) if one.owner in excluded)
    example = walk.full_example
    sizes = {"": example} if isinstance(example, Tensor) else example
    return Sites(
        found=tuple(walk.expanded(best)),
        excluded=excluded,
        total_macs=macs,
        ending=ending,
        input_size={key: tuple(value.shape) for key, value in sizes.items() if isinstance(value, Tensor)},
        fixed_inputs=fixed_of(walk.example),
        base=base,
        alternatives=tuple(walk.expanded(other)),
        attentions=sum(counts),
        covered=sum(counts) - missed,
        narrowed=dict(flow.refused),
    )


def _choose(walk: Walk, found: Sequence[Found]) -> tuple[list[AttentionSite], list[AttentionSite], dict[str, str]]:
    """Give each attention the sites of the first scope that has any; list the other sites, and why there are none."""
    best: list[AttentionSite] = []
    other: list[AttentionSite] = []
    excluded: dict[str, str] = {}
    refused = [dict(scope.refused) for scope in found]
    for number, attended in enumerate(walk.recording.attended):
        several = [scope.sites.get(number, []) for scope in found]
        first = next((sites for sites in several if sites), [])
        chosen = [site for site in first if not site.spare] or first
        best += [site for site in chosen if site not in best]
        other += [site for sites in several for site in sites if site not in chosen and site not in other]
        if not first:  # of each scope the reason that is closest: the attention's own, its block's, the whole model's
            reasons = [next((of[name] for name in reversed(attended.around) if name in of), "") for of in refused]
            excluded[attended.owner] = "; ".join(filter(None, dict.fromkeys(reasons)))
    # a module that attends twice is served by what lies behind the last time
    served = {site.attention for site in (*best, *other)}
    excluded = {name: why for name, why in excluded.items() if name not in served}
    return best, [site for site in other if site not in best], excluded
