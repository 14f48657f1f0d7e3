"""How does a model leave for another runtime? A folder with its graph, its configuration and its preprocessing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.converted.record import disabled, get_plan, is_retrofitted, unwrapped
from ltm_retrofit.converted.resizing import image_shape, present_example
from ltm_retrofit.errors import DataError, ExampleError, RecipeError, check_choice, in_words
from ltm_retrofit.finding.example import Example, home, prepare_example, processors_of
from ltm_retrofit.folders import OURS, check_ours, written_whole
from ltm_retrofit.saving.agreement import Timed, check, same_answers, timed
from ltm_retrofit.saving.base import describe_base
from ltm_retrofit.saving.formats import FORMATS, INPUT, OUTPUT, Format, Logits, opset_of, quantize, write
from ltm_retrofit.saving.save import CONFIG, PROCESSOR
from ltm_retrofit.tuning.preprocessing import options_for
from ltm_retrofit.undisturbed import copied, undisturbed, without_autocast

#: says what the folder holds, how it was checked, and which of its files are ours
MARK = "export.json"
#: random images on which every export is checked
RANDOM = 16
#: batch sizes at which it is timed beside the original's
TIMED = (1, 8)


@dataclass(frozen=True)
class Exported:
    """What `export` wrote, and what it measured meanwhile.

    Attributes:
        path: the folder.
        format: ``"onnx"``, ``"openvino"`` or ``"torch"``.
        opset: the version of ONNX's operators; None for other formats.
        images: on how many images it was checked, random ones included.
        given: how many of them were given, as ``images``.
        largest: the largest difference of a logit from torch's, as a share of ``max(1, max|logit|)``, of images whose
            merging choices agree; of int8 before it was quantised.
        near_ties: on how many images they do not agree, because rounding decides.
        same_answer: of int8, the share of the given images, else of the random ones, with the float model's answer;
            None where it is not int8.
        kl: of int8, the mean KL to the float model's answers, on the same images, in nats.
        latency: by batch size, the original's export beside this one; empty where it was not timed.
        preprocessing: who makes its images, in words.

    Example:
        >>> import pathlib, ltm_retrofit as ltm
        >>> found = {"images": 16, "given": 0, "largest": 1.4e-6, "near_ties": 0}
        >>> print(str(ltm.Exported(pathlib.Path("served"), "onnx", 20, **found)).splitlines()[0])
        written  served/model.onnx, for ONNX Runtime, opset 20: any batch, one height and width
    """

    path: Path
    format: str
    opset: int | None
    images: int
    given: int
    largest: float
    near_ties: int
    same_answer: float | None = None
    kl: float | None = None
    latency: Mapping[int, Timed] = field(default_factory=dict)
    preprocessing: str = ""

    def __str__(self) -> str:
        """Return a line for each thing that was found."""
        kind = FORMATS[self.format]
        opset = "" if self.opset is None else f", opset {self.opset}"
        int8 = "" if self.kl is None else ", int8"
        ties = f"; on {self.near_ties} more, rounding decides who merges" if self.near_ties else ""
        agreeing, graph = self.images - self.near_ties, "" if self.kl is None else "before int8, "
        lines = [
            f"written  {self.path}/{kind.file}, for {kind.runtime}{opset}{int8}: any batch, one height and width",
            f"checked  on {agreeing} images: {graph}logits differ by at most {self.largest:.1e} of the largest{ties}",
            f"images   {self.preprocessing}",
        ]
        if self.same_answer is not None:
            on = f"{self.given} images given" if self.given else f"{self.images} random images, which says little"
            lines.append(f"int8     the same answer as in float on {self.same_answer:.1%} of {on}; KL {self.kl:.4f}")
        lines += [f"batch {batch:<2} {taken}" for batch, taken in self.latency.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {**asdict(self), "path": str(self.path)}


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str = "onnx",
    int8: bool = False,
    example: Example | None = None,
    images: Tensor | None = None,
    overwrite: bool = False,
    seconds: float = 20.0,
    say: Callable[[str], object] = str,
) -> Exported:
    """Write a model for another runtime, into a folder of its own, and check there that it computes the same.

    The graph takes ``pixel_values (B, C, H, W)`` in float32, of any batch and one height and width, and gives
    ``logits (B, classes)``. ONNX is written in opset 20. Beside it lie ``config.json`` and the preprocessing, as
    ``optimum`` and transformers read them, and ``export.json``, which says how it was checked. The model is not
    changed; one in bfloat16 is exported, and compared, in float32.

    Args:
        model: converted or not.
        path: the folder, made where it does not exist.
        format: ``"onnx"`` (``model.onnx``), ``"openvino"`` (``openvino_model.xml``) or ``"torch"`` (``model.pt2``).
        int8: of ONNX, products with weights in int8. Its logits are others: how often its answer is the float model's
            is measured, and nothing is refused for it.
        example: an image, or ``{"pixel_values": image}``, where the model does not say how large its images are.
        images: ``(n, C, H, W)``, as `load_images` makes them, to check on beside random ones.
        overwrite: replace a folder that holds nothing but what this function wrote.
        seconds: for timing a converted model's export beside the original's; at 0 it is not timed.
        say: receives a line as each part begins.

    Raises:
        CheckpointError: where a library is missing, the folder cannot be written, the model cannot be exported, or the
            file computes something else: by more than 1e-5 of the largest logit, in OpenVINO 1e-4, on an image whose
            merging choices do not hang on rounding, or on more than one in fifty that do. Nothing is written then.
        ExampleError: where the model takes more than images, gives no class logits, or the example has another size
            than the model is converted for.
        RecipeError: where ``format`` is unknown, or ``int8`` is asked of another than ONNX.
        DataError: where ``images`` are of another shape than the model's.

    Example:
        >>> import timm, ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7)
        >>> exported = ltm.export(ltm.retrofit(model), "served", format="torch", seconds=0)
        >>> exported.largest < 1e-5, sorted(file.name for file in exported.path.iterdir())
        (True, ['config.json', 'export.json', 'model.pt2'])
    """
    check_choice(format, FORMATS, "format")
    if int8 and format != "onnx":
        raise RecipeError(f"int8=True is for format='onnx', got {format!r}: leave one of them out")
    kind, target = FORMATS[format], Path(path).expanduser()
    kind.check_installed()
    check_ours(target, MARK, overwrite=overwrite)
    with _twin(unwrapped(model)) as twin:
        host, shape = _with_logits(twin, example)
        some = torch.randn(RANDOM, *shape, generator=torch.Generator().manual_seed(0))
        compared = torch.cat([some, _checked(images, shape)])
        with written_whole(target, MARK, overwrite=overwrite) as folder:
            made = _write_beside(folder, unwrapped(model), shape, host(some[:1]).shape[1])
            say(f"export   for {kind.runtime}")
            file = folder / kind.file
            write(kind, host, some[:2], file)
            say(f"check    on {len(compared)} images")
            agreed = check(kind.open(file), host, compared, kind)
            answer, kl = None, None
            if int8:
                quantize(file)
                answer, kl = same_answers(kind.open(file), host, compared if images is None else compared[RANDOM:])
            latency = _against_original(kind, host, some, file, int8, seconds, say)
            exported = Exported(
                path=target,
                format=format,
                opset=opset_of(file) if format == "onnx" else None,
                images=len(compared),
                given=len(compared) - RANDOM,
                largest=agreed.largest,
                near_ties=agreed.near_ties,
                same_answer=answer,
                kl=kl,
                latency=latency,
                preprocessing=made,
            )
            _write_mark(folder, unwrapped(model), exported, shape)
    return exported


# ----------------------------------------------------------------------------------------------------- what is exported


@contextmanager
def _twin(model: nn.Module) -> Iterator[nn.Module]:
    """Give a copy in float32 on the CPU, in eval mode; meanwhile nobody's autocast or inference mode holds."""
    if home(model)[0].type == "meta":
        raise ExampleError(f"the weights of this {type(model).__name__} are on the meta device: load them, then export")
    with torch.inference_mode(False), torch.no_grad(), without_autocast():
        twin = copied(model).float().cpu()
        with undisturbed(twin):
            yield twin


def _with_logits(model: nn.Module, example: Example | None) -> tuple[Logits, tuple[int, int, int]]:
    """Return the model with images as its one input and logits as its output, and the shape of an image.

    Raises:
        ExampleError: where that cannot be.
    """
    if example is None:
        given = present_example(model)
    else:
        on = {key: value.float().cpu() if _is_image(value) else value for key, value in _named(example).items()}
        given = prepare_example(model, on if isinstance(example, Mapping) else on[""])
    tensors = {key: value for key, value in _named(given).items() if isinstance(value, Tensor)}
    if len(tensors) != 1 or not all(map(_is_image, tensors.values())):
        named = ", ".join(f"{key or 'a tensor'} {tuple(value.shape)}" for key, value in tensors.items())
        raise ExampleError(f"what is exported takes images (B, C, H, W) and nothing else, and this model takes {named}")
    ((name, image),) = tensors.items()
    shape = (int(image.shape[1]), int(image.shape[2]), int(image.shape[3]))
    expected = image_shape(model) if is_retrofitted(model) else None
    if expected is not None and shape != expected:
        raise ExampleError(
            f"the example is an image of {shape[1]}×{shape[2]} with {shape[0]} channels, and this model is converted "
            f"for {expected[1]}×{expected[2]} with {expected[0]}: leave the example out, or convert for that size"
        )
    host = Logits(model, name or None)
    try:
        logits = host(image)
    except Exception as error:  # a model may fail in any way
        raise ExampleError(
            f"{type(model).__name__} does not run on an image of {shape[1]}×{shape[2]} in float32 on the CPU: "
            f"{type(error).__name__}: {in_words(error)}"
        ) from error
    if logits is None:
        raise ExampleError(
            f"{type(model).__name__} puts out no class logits (B, classes), and those are what is exported: give a "
            "model with a classifier"
        )
    return host, shape


def _named(example: Example) -> Mapping[str, Any]:
    return example if isinstance(example, Mapping) else {"": example}


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()


def _checked(images: Tensor | None, shape: tuple[int, int, int]) -> Tensor:
    """Return a user's images as the exported graph takes them; none where there are none.

    Raises:
        DataError: where they are of another shape.
    """
    if images is None:
        return torch.empty(0, *shape)
    if not _is_image(images) or tuple(images.shape[1:]) != shape or not len(images):
        given = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise DataError(f"images to check on are {given}, and this model takes (n, {', '.join(map(str, shape))})")
    return images.detach().float().cpu()


# ----------------------------------------------------------------------------------------------------------- the clock


def _against_original(
    kind: Format, host: Logits, some: Tensor, file: Path, int8: bool, seconds: float, say: Callable[[str], object]
) -> dict[int, Timed]:
    """Export the original as well, into a folder that is thrown away, and time both in turn; by batch size."""
    if not is_retrofitted(host) or seconds <= 0:
        return {}
    say("time     beside the original's export")
    found: dict[int, Timed] = {}
    with TemporaryDirectory(prefix=".ltm-original.", dir=file.parent.parent) as room:
        before = Path(room, kind.file)
        with disabled(host):
            write(kind, host, some[:2], before)
        if int8:
            quantize(before)
        original, converted = kind.open(before), kind.open(file)
        started = time.perf_counter()
        for place, batch in enumerate(TIMED):
            left = seconds - (time.perf_counter() - started)
            ways = (partial(original, some[:batch]), partial(converted, some[:batch]))
            found[batch] = timed(*ways, max(0.0, left) / (len(TIMED) - place))
        del original, converted  # a runtime may hold its file open
    return found


# ------------------------------------------------------------------------------------------------ what lies beside it


def _write_beside(folder: Path, model: nn.Module, shape: tuple[int, int, int], classes: int) -> str:
    """Write the configuration and the preprocessing; say in words who makes the images."""
    sides = shape[1] if shape[1] == shape[2] else list(shape[1:])
    labels = _labels(model, classes)
    made = "made by nobody: this model came without an image processor, and what it wants is for you to know"
    declared = getattr(model, "pretrained_cfg", None)
    config: dict[str, Any] = {"architectures": [type(model).__name__]}
    if isinstance(declared, Mapping) and declared.get("architecture"):
        config |= {"model_type": "timm_wrapper", "architecture": declared["architecture"], "num_classes": classes}
        config |= {"label_names": labels, "pretrained_cfg": _timms(declared, shape)}
        made = f"made by timm's transform: AutoImageProcessor reads it from {CONFIG}"
    else:
        own: Any = getattr(model, "config", None)
        if hasattr(own, "to_json_string"):
            config = {**_plain(json.loads(own.to_json_string())), **config}
        processor = next(iter(processors_of(model).values()), None)
        if processor is not None:
            made = _write_processor(folder, processor, shape)
    # optimum reads a config without its class, which would take the names from elsewhere
    config |= {"image_size": sides, "num_labels": classes, "id2label": dict(enumerate(labels))}
    config["label2id"] = {label: index for index, label in enumerate(labels)}
    _write_json(folder / CONFIG, config)
    return made


def _write_processor(folder: Path, processor: Any, shape: tuple[int, int, int]) -> str:
    """Write an image processor at the size of the graph; say in words what came of it."""
    try:
        written = {**json.loads(processor.to_json_string()), **options_for(processor, shape)}
    except DataError as error:  # the graph is no worse for it, and its user is told
        return f"not made by a file in this folder: {error}"
    _write_json(folder / PROCESSOR, written)
    return f"made by {type(processor).__name__}: {PROCESSOR}"


def _timms(declared: Mapping[str, Any], shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return timm's settings with those of evaluation resolved: what ``TimmWrapperImageProcessor`` builds from."""
    from timm.data import resolve_data_config  # type: ignore[attr-defined]

    settings = resolve_data_config({"input_size": shape}, dict(declared))  # type: ignore[no-untyped-call]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def _labels(model: nn.Module, classes: int) -> list[str]:
    """Name every class, as transformers does where nobody has."""
    declared = getattr(model, "pretrained_cfg", None)
    named = getattr(getattr(model, "config", None), "id2label", None) or {}
    if isinstance(declared, Mapping) and declared.get("label_names"):
        named = dict(enumerate(declared["label_names"]))
    known = set(named) == set(range(classes))
    return [str(named[index]) if known else f"LABEL_{index}" for index in range(classes)]


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what names a place, or could have code fetched."""
    return {key: value for key, value in config.items() if not key.startswith("_") and key != "auto_map"}


def _write_mark(folder: Path, model: nn.Module, exported: Exported, shape: tuple[int, int, int]) -> None:
    base = describe_base(model)
    said = {key: base[key] for key in ("library", "class", "architecture", "id", "revision") if base.get(key)}
    plan = get_plan(model) if is_retrofitted(model) else None
    libraries = ("ltm-retrofit", "torch", *FORMATS[exported.format].needs)
    values = exported.to_dict()
    del values["path"]
    _write_json(
        folder / MARK,
        {
            "written_by": OURS,
            "inputs": {INPUT: ["batch", *shape]},
            "outputs": {OUTPUT: ["batch", "classes"]},
            "base": said,
            "macs_share": None if plan is None else plan.share,
            "method": None if plan is None else plan.config.method,
            "versions": {name: version(name) for name in libraries},
            **values,
            "files": sorted([MARK, *(file.name for file in folder.iterdir())]),
        },
    )


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
