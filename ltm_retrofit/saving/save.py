"""How is a converted model written, into a folder or onto the Hub? Configuration, weights and the model card."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from torch import Tensor, nn

from ltm_retrofit.converted.classifier import follow_classifier
from ltm_retrofit.converted.record import LOADED, converted_part, get_plan, was_finetuned
from ltm_retrofit.converted.resizing import resized
from ltm_retrofit.errors import CheckpointError
from ltm_retrofit.finding.example import processors_of, shapes_in_words
from ltm_retrofit.folders import OURS, check_ours, written_whole
from ltm_retrofit.hub import in_short, is_repository
from ltm_retrofit.plan import MergePlan
from ltm_retrofit.saving.adapter import adapter_state, labels_of
from ltm_retrofit.saving.base import auto_class, describe_base, differing, proven_base

FORMAT_VERSION = 3
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
#: why an adapter is not loaded without its base
ADAPTER = "this is an adapter"
#: what transformers takes for the name of the weights where a class of its own (not an Auto class) reads a folder of
#: ours: no such file, instead of a model that lacks its masks without a word
NOT_ALONE = "load this folder by ltm_retrofit.from_pretrained.safetensors"
#: of a model whose images one of transformers' image processors makes
PROCESSOR = "preprocessor_config.json"


def save_pretrained(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    adapter: bool = False,
    allow_unloadable: bool = False,
    report: Any = None,
    recipe: Any = None,
) -> None:
    """Write a converted model into a folder of its own; a failure leaves what was there before.

    Args:
        model: the converted model; it is not changed, but for a plan that did not know of a new classifier yet.
        path: the folder, made where it does not exist.
        overwrite: replace a folder that holds nothing but what this function wrote.
        adapter: write masks, statistics, a new classifier and what else changed since the conversion, to be attached
            to the base checkpoint: by ``from_pretrained(path)`` where that is on the Hub, else by ``base=model``.
        allow_unloadable: write a folder even where it needs ``from_pretrained(path, base=model)``, because no file can
            say how to build the host: a class of your own, or timm's not made by ``timm.create_model``.
        report: an object with ``to_markdown()`` for the model card.
        recipe: the recipe that made the model, a mapping or text, for the model card.

    Raises:
        NotRetrofitted: where the model is not converted.
        UnsupportedBlock: where its classifier was replaced by one that reads tokens that are gone.
        CheckpointError: where the folder cannot be written, or holds files that are not ours; where it could not be
            loaded alone, and this was not allowed; where so much was trained that there is no base left for an
            adapter; where the plan was made for another host.

    Example:
        >>> import pathlib, timm
        >>> import ltm_retrofit as ltm
        >>> tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
        >>> model = ltm.retrofit(timm.create_model("vit_tiny_patch16_224", **tiny))
        >>> ltm.save_pretrained(model, "saved")
        >>> sorted(file.name for file in pathlib.Path("saved").iterdir())
        ['README.md', 'config.json', 'model.safetensors']
    """
    model = converted_part(model)
    target = Path(path).expanduser()
    check_ours(target, CONFIG, overwrite=overwrite)
    contents = contents_of(model, adapter, allow_unloadable)
    if (loaded := model.__dict__.get(LOADED)) and was_finetuned(model):  # so that a report finds what it was before
        tuned_from = {"path": os.path.relpath(loaded[0], target.absolute()), "sha256": loaded[1]}
        contents = replace(contents, config={**contents.config, "tuned_from": tuned_from})
    with written_whole(target, CONFIG, overwrite=overwrite) as folder:
        contents.write(folder, target.resolve().name, report, recipe)


def push_to_hub(
    model: nn.Module,
    repo: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    adapter: bool = False,
    allow_unloadable: bool = False,
    report: Any = None,
    recipe: Any = None,
) -> str:
    """Write a converted model into a repository of the Hugging Face Hub; return the address of the commit.

    Args:
        model: the converted model.
        repo: its id there, ``"user/name"``, or a name in the namespace of the token; made where it does not exist.
        token: of an account that may write there; left out, the one that ``hf auth login`` stored.
        private: whether a new repository is private.
        revision: the branch, made where it does not exist.
        commit_message: what the commit is called.
        create_pr: open a pull request instead of writing to the branch.
        adapter: as for `save_pretrained`.
        allow_unloadable: likewise.
        report: likewise.
        recipe: likewise.

    Raises:
        NotRetrofitted, UnsupportedBlock: as from `save_pretrained`; nothing was sent.
        CheckpointError: likewise; and where ``repo`` is no id, or the Hub cannot be reached or refuses.

    Example:
        >>> import timm, ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7)
        >>> model = ltm.retrofit(model)
        >>> ltm.push_to_hub(model, "user/tiny", private=True)  # doctest: +SKIP
        'https://huggingface.co/user/tiny/commit/…'
        >>> model = ltm.from_pretrained("user/tiny")  # doctest: +SKIP
    """
    from huggingface_hub import HfApi

    if not is_repository(repo if "/" in repo else f"user/{repo}"):
        raise CheckpointError(f"{repo!r} is no repository of the Hub: expected 'user/name'")
    contents = contents_of(model, adapter, allow_unloadable)
    hub = HfApi(token=token, library_name=OURS, library_version=version("ltm-retrofit"))
    with TemporaryDirectory() as folder:
        try:
            repo = hub.create_repo(repo, private=private, exist_ok=True).repo_id
            contents.write(Path(folder), repo, report, recipe)
            if revision is not None and not create_pr:
                hub.create_branch(repo, branch=revision, exist_ok=True)
            commit = hub.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or "Upload a model converted by ltm_retrofit",
            )
        except Exception as error:  # httpx, huggingface_hub and the file system each have their own
            raise CheckpointError(
                f"{repo!r} cannot be written on the Hugging Face Hub: {in_short(error)}. Check the name, the "
                "connection and the token (hf auth login, or token=)"
            ) from error
    return str(commit.commit_url)


@dataclass(frozen=True)
class Contents:
    """What a folder will hold: checked, and not written yet."""

    state: Mapping[str, Tensor]
    config: Mapping[str, Any]
    plan: MergePlan
    processor: Any = None  # of images, where one came with the model

    def write(self, folder: Path, name: str, report: Any = None, recipe: Any = None) -> None:
        """Write it into a folder that is there; ``name`` is by what it will be loaded."""
        base, reason = self.config["base"], self.config["reason"]
        _write_weights(self.state, folder / WEIGHTS)
        files = list(self.config["files"])
        if self.processor is not None:
            self.processor.save_pretrained(folder)  # one of timm's settings writes nothing: the base's config has them
            files += [PROCESSOR] if (folder / PROCESSOR).is_file() else []
        config = {**self.config, "sha256": digest(folder / WEIGHTS), "files": files}
        (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        card = model_card(name, base, self.plan, reason, report, recipe)
        (folder / CARD).write_text(card, encoding="utf-8")


def contents_of(
    model: nn.Module, adapter: bool, allow_unloadable: bool, given: Mapping[str, Tensor] | None = None
) -> Contents:
    """Check that a model can be saved, and say what will be written."""
    model = converted_part(model)
    follow_classifier(model, thorough=True)
    plan, size = get_plan(model), resized(model)
    extra: dict[str, Any] = {} if size is None else {"resized": list(size)}
    state: Mapping[str, Tensor] = model.state_dict()
    if given is not None:
        if differences := differing(state, given):
            raise CheckpointError(f"the state dict is not that of this {type(model).__name__}: {differences}")
        state = {key: given[key] for key in state}
    if adapter:
        state, attached = adapter_state(model)
        extra |= {"adapter": attached, "labels": labels_of(model)}
    # an adapter's base is built from a file only where it can be fetched; else a user brings it
    described = describe_base(model) if adapter else None
    base, reason = proven_base(model) if described is None or described["id"] else (described, None)
    reason = ADAPTER if adapter else reason
    if reason is not None and not (adapter or allow_unloadable):
        raise CheckpointError(
            f"this {type(model).__name__} cannot be rebuilt from a file ({reason}): what is saved will only load by "
            "from_pretrained(path, base=<the original model>). Where that will do, pass allow_unloadable=True"
        )
    config = {
        "format": OURS,
        "format_version": FORMAT_VERSION,
        "model_type": OURS,
        "transformers_weights": NOT_ALONE,
        "versions": {name: version(name) for name in ("ltm-retrofit", "torch", "timm", "transformers")},
        "base": base,
        "rebuildable": reason is None,
        "reason": reason,
        "plan": plan.to_dict(),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}),
        "files": [CONFIG, WEIGHTS, CARD],
        **extra,
    }
    return Contents(state, config, plan, next(iter(processors_of(model).values()), None))


def rewrite_card(folder: Path, report: Any, recipe: Any = None) -> None:
    """Write the card of a saved model anew, now with a report: a model is saved before it is measured."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    plan = MergePlan.from_dict(config["plan"])
    card = model_card(folder.resolve().name, config["base"], plan, config["reason"], report, recipe)
    (folder / CARD).unlink(missing_ok=True)  # where it is a link, the other name of the file keeps what it says
    (folder / CARD).write_text(card, encoding="utf-8")


def digest(file: Path) -> str:
    """Return the SHA-256 of a file, by which a folder knows its weights again."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
        name: the folder's name, or the id of the repository.
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
    alone = reason is None or (reason == ADAPTER and base.get("id"))
    call = f'ltm.from_pretrained("{name}")' if alone else f'ltm.from_pretrained("{name}", base=base)'
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False) + "---",
        f"# {name}\n\n{origin}, retrofitted with token merging, method `{plan.config.method}`.",
        f"**MACs for one image: {plan.macs_original / 1e9:.3f} G before, {plan.macs / 1e9:.3f} G after "
        f"(×{plan.share:.3f})**, predicted for {shapes_in_words(plan.input_size)}, masks included.",
        f"| block | action | tokens in | tokens out |\n|---|---|---|---|\n{rows}",
        f"## Load it\n\n```python\nimport ltm_retrofit as ltm\n\nmodel = {call}\n```",
    ]
    if alone and base.get("library") == "transformers":
        auto = auto_class(base["class"])
        parts.append(
            "Or as any model of transformers:\n\n```python\nimport ltm_retrofit.auto\nfrom transformers import "
            f'{auto}\n\nmodel = {auto}.from_pretrained("{name}")\n```'
        )
    if not alone:
        weights = "with the weights that it was trained on" if reason == ADAPTER else "any weights"
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
