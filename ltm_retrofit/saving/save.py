"""How is a converted model written? config.json, model.safetensors and README.md, the model card."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from ltm_retrofit.converted.classifier import follow_classifier
from ltm_retrofit.converted.record import get_plan
from ltm_retrofit.converted.resizing import resized
from ltm_retrofit.finding.example import processors_of
from ltm_retrofit.folders import OURS, check_ours, written_whole
from ltm_retrofit.plan import MergePlan
from ltm_retrofit.saving.adapter import adapter_state, labels_of
from ltm_retrofit.saving.base import describe_base, proven_base

FORMAT_VERSION = 2
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
PROCESSOR = "preprocessor_config.json"  # of a model whose images one of transformers' image processors makes


def save_pretrained(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    adapter: bool = False,
    report: Any = None,
    recipe: Any = None,
) -> None:
    """Write a converted model into a folder of its own; a failure leaves what was there before.

    Args:
        model: the converted model; it is not changed, but for a plan that did not know of a new classifier yet.
        path: the folder, made where it does not exist.
        overwrite: replace a folder that holds nothing but what this function wrote.
        adapter: write masks, statistics, a new classifier and what else changed since the conversion, to be attached
            to the base checkpoint by ``from_pretrained(path, base=model)``.
        report: an object with ``to_markdown()`` for the model card.
        recipe: the recipe that made the model, a mapping or text, for the model card.

    Raises:
        NotRetrofitted: where the model is not converted.
        UnsupportedBlock: where its classifier was replaced by one that reads tokens that are gone.
        CheckpointError: where the folder cannot be written, or holds files that are not ours; where so much was
            trained that there is no base left for an adapter; where the plan was made for another host.

    Example:
        >>> import pathlib, timm
        >>> import ltm_retrofit as ltm
        >>> tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
        >>> model = ltm.retrofit(timm.create_model("vit_tiny_patch16_224", **tiny))
        >>> ltm.save_pretrained(model, "saved")
        >>> sorted(file.name for file in pathlib.Path("saved").iterdir())
        ['README.md', 'config.json', 'model.safetensors']
    """
    get_plan(model)
    target = Path(path).expanduser()
    check_ours(target, CONFIG, overwrite=overwrite)
    follow_classifier(model, thorough=True)
    plan, size = get_plan(model), resized(model)
    extra: dict[str, Any] = {} if size is None else {"resized": list(size)}
    state, attached = adapter_state(model) if adapter else (model.state_dict(), None)
    base, reason = (describe_base(model), "this is an adapter") if adapter else proven_base(model)
    if attached is not None:
        extra |= {"adapter": attached, "labels": labels_of(model)}
    elif reason is not None:
        warnings.warn(
            f"the base {type(model).__name__} cannot be rebuilt from a file ({reason}): loading this folder will need "
            "from_pretrained(path, base=<the original model>)",
            stacklevel=2,
        )
    config: dict[str, Any] = {
        "format": OURS,
        "format_version": FORMAT_VERSION,
        "versions": {name: version(name) for name in ("ltm-retrofit", "torch", "timm", "transformers")},
        "base": base,
        "rebuildable": reason is None,
        "reason": reason,
        "plan": plan.to_dict(),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}),
        "files": [CONFIG, WEIGHTS, CARD],
        **extra,
    }
    card = model_card(target.resolve().name, base, plan, reason, report, recipe)
    with written_whole(target, CONFIG, overwrite=overwrite) as folder:
        _write_weights(state, folder / WEIGHTS)
        config["sha256"] = digest(folder / WEIGHTS)
        config["files"] += _write_processor(model, folder)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / CARD).write_text(card, encoding="utf-8")


def digest(file: Path) -> str:
    """Return the SHA-256 of a file, by which a folder knows its weights again."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_processor(model: nn.Module, folder: Path) -> list[str]:
    """Write the image processor that came with a model, if one did; return the names of the files."""
    for processor in list(processors_of(model).values())[:1]:
        processor.save_pretrained(folder)  # one of timm's settings writes nothing: they are in the base's config
    return [PROCESSOR] if (folder / PROCESSOR).is_file() else []


def _write_weights(state: Mapping[str, Tensor], file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # safetensors stores no shared memory: tied weights are written twice, and a view without what lies around it
    seen, separate = set[int](), dict[str, Tensor]()
    for key, tensor in state.items():
        memory = tensor.untyped_storage()
        shared = memory.data_ptr() in seen or memory.nbytes() != tensor.nbytes
        separate[key] = (tensor.detach().clone() if shared else tensor.detach()).contiguous()
        seen.add(memory.data_ptr())
    try:
        save_file(separate, file, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, as its own kind of error
        raise OSError(str(error)) from error


def model_card(
    name: str, base: Mapping[str, Any], plan: MergePlan, reason: str | None, report: Any = None, recipe: Any = None
) -> str:
    """Write the README.md of a saved model.

    Args:
        name: the folder's name.
        base: the description of the base.
        plan: what was merged.
        reason: why the base cannot be rebuilt, or None.
        report: an object with ``to_markdown()``, or None.
        recipe: the recipe that made the model, a mapping or text, or None.
    """
    front: dict[str, Any] = {
        "library_name": "ltm_retrofit",
        "tags": ["token-merging", "vision-transformer", "ltm_retrofit", *filter(None, [base.get("library")])],
    }
    if plan.classes:
        front["pipeline_tag"] = "image-classification"
    if base.get("id"):
        front["base_model"] = base["id"]
    origin = f"{base.get('architecture') or base.get('class')} ({base.get('library')})"
    rows = "\n".join(f"| `{row.site}` | {row.action} | {row.tokens_in} | {row.tokens_out} |" for row in plan.rows)
    sizes = "; ".join(f"{key} {list(size)}".strip() for key, size in plan.input_size.items())
    call = f'ltm.from_pretrained("{name}")' if reason is None else f'ltm.from_pretrained("{name}", base=base)'
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False) + "---",
        f"# {name}\n\n{origin}, retrofitted with token merging, method `{plan.config.method}`.",
        f"**MACs for one image: {plan.macs_original / 1e9:.3f} G before, {plan.macs / 1e9:.3f} G after "
        f"(×{plan.share:.3f})**, predicted at input size {sizes}, masks included.",
        f"| block | action | tokens in | tokens out |\n|---|---|---|---|\n{rows}",
        f"## Load it\n\n```python\nimport ltm_retrofit as ltm\n\nmodel = {call}\n```",
    ]
    if reason is not None:
        weights = "with the weights that it was trained on" if "adapter" in reason else "any weights"
        parts.append(f"`base` is the original model, built by you ({weights}), because: {reason}.")
    if report is not None:
        parts.append(f"## Report\n\n{report.to_markdown()}")
    if recipe is not None:
        text = yaml.safe_dump(dict(recipe), sort_keys=False) if isinstance(recipe, Mapping) else str(recipe)
        parts.append(f"## Recipe\n\n```yaml\n{text.rstrip()}\n```")
    last = (
        "All tokens are brought back after the last block; merged ones are copies of their group."
        if plan.unmerge
        else "Only prefix tokens (class, distillation, registers) leave the last block."
    )
    return "\n\n".join(parts) + (
        "\n\n## Limits\n\n- Planned for the input size above; at another one the same share of the tokens is kept.\n"
        f"- Merging loses detail: dense outputs suffer first.\n- {last}\n"
    )
