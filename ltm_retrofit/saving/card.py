"""The model card: what a folder says of itself to a reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from ltm_retrofit.plan import MergePlan


def model_card(
    name: str, base: Mapping[str, Any], plan: MergePlan, reason: str | None, report: Any = None, recipe: Any = None
) -> str:
    """Write the README.md of a saved model.

    Args:
        name: the folder's name.
        base: the base's record.
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
    limits = "- Planned for the input size above; at another one the same share of the tokens is kept."
    limits += "\n- Merging loses detail: dense outputs suffer first."
    if plan.unmerge:
        limits += "\n- All tokens are brought back after the last block; merged ones are copies of their group."
    else:
        limits += "\n- Only prefix tokens (class, distillation, registers) leave the last block."
    return "\n\n".join([*parts, f"## Limits\n\n{limits}"]) + "\n"
