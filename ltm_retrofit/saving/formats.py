"""How does a model become a file that another runtime runs, and how is that file run? ONNX, OpenVINO, torch.export."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import CheckpointError, in_words
from ltm_retrofit.finding.example import logits_of, run

#: names of what goes in, ``(B, C, H, W)``, and of what comes out, ``(B, classes)``: those that transformers has
INPUT, OUTPUT = "pixel_values", "logits"
#: of ONNX's operators; ONNX Runtime has known it since 1.17
OPSET = 20

#: images ``(B, C, H, W)`` → logits ``(B, classes)``, both float32 on the CPU
Session = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """A kind of file: what it needs, what it writes, and how far a runtime's logits may be from torch's.

    ``tolerance`` is a share of the largest logit, or of one where all are smaller.
    """

    runtime: str
    file: str
    tolerance: float
    extra: str | None
    needs: tuple[str, ...]
    write: Callable[[nn.Module, Tensor, Path], None]
    open: Callable[[Path], Session]

    def check_installed(self) -> None:
        """Check that what it needs is installed.

        Raises:
            CheckpointError: where it is not, with the command that installs it.
        """
        if missing := [name for name in self.needs if find_spec(name) is None]:
            raise CheckpointError(
                f"an export for {self.runtime} needs {', '.join(missing)}, which this environment lacks: run "
                f"pip install 'ltm-retrofit[{self.extra}]'"
            )


class Logits(nn.Module):
    """A host with one argument, ``pixel_values``, and one output, its class logits.

    Args:
        host: the model.
        argument: the name of the argument that takes its images; None where that is its first one.
    """

    def __init__(self, host: nn.Module, argument: str | None) -> None:
        super().__init__()
        self.host, self.argument = host, argument

    def forward(self, pixel_values: Tensor) -> Tensor | None:
        """Return the logits ``(B, classes)`` of images; None where the host puts out none."""
        given = pixel_values if self.argument is None else {self.argument: pixel_values}
        return logits_of(run(self.host, given))


@contextmanager
def _quiet() -> Iterator[None]:
    """Tracers warn of each constant that they keep; what is wrong with a file, a comparison finds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --------------------------------------------------------------------------------------------------------------- ONNX


def _write_onnx(model: nn.Module, images: Tensor, file: Path) -> None:
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    # Unoptimised: two thirds of an export (140 s of a ViT-S) would look for patterns that runtimes look for anyway.
    # Constants are folded here, for int8 needs them so, and a file is opened more often than it is written.
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        verbose=False,
        optimize=False,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )
    assert program is not None
    graph = program.model
    optimizer.inline(graph)
    optimizer.fold_constants(graph)
    every: tuple[Any, ...] = (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),  # each node's stack, with paths of this machine
    )
    for tidy in every:
        tidy(graph)
    program.save(file)  # one file, up to the two gigabytes that it can have


def open_onnx(file: Path) -> Session:
    """Open an ONNX file in ONNX Runtime on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def call(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return call


def opset_of(file: Path) -> int:
    """Return the version of ONNX's operators that a file says."""
    import onnx

    imported = onnx.load(file, load_external_data=False).opset_import
    return int(next(entry.version for entry in imported if entry.domain in ("", "ai.onnx")))


def quantize(file: Path) -> None:
    """Replace an ONNX file by one whose products with weights are in int8; activations are rounded as they come.

    Each row of weights has a scale of its own, and seven bits: with eight, sums of two products overflow on processors
    without VNNI.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    small = file.with_suffix(".int8.onnx")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it asks for a preprocessing that `_write_onnx` has done
    try:
        quantize_dynamic(
            file,
            small,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
    finally:
        logging.disable(before)
    small.replace(file)


# ----------------------------------------------------------------------------------------------------------- OpenVINO


def _write_openvino(model: nn.Module, images: Tensor, file: Path) -> None:
    import openvino

    # From torch, not from ONNX: ONNX has no stable sort, and OpenVINO takes any of equals.
    graph = openvino.convert_model(model, example_input=images, input=[-1, *images.shape[1:]])
    graph.inputs[0].get_tensor().set_names({INPUT})
    graph.outputs[0].get_tensor().set_names({OUTPUT})
    openvino.save_model(graph, file, compress_to_fp16=False)


def _open_openvino(file: Path) -> Session:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(file, "CPU", settings)

    def call(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(images.numpy())[0].copy())

    return call


# -------------------------------------------------------------------------------------------------------------- torch


def _write_torch(model: nn.Module, images: Tensor, file: Path) -> None:
    batch = {0: torch.export.Dim("batch", min=1)}
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=(batch,), strict=False), file)


def _open_torch(file: Path) -> Session:
    program: Session = torch.export.load(file).module()
    return program


FORMATS = {
    "onnx": Format(
        *("ONNX Runtime", "model.onnx", 1e-5, "onnx", ("onnx", "onnxscript", "onnxruntime")),
        *(_write_onnx, open_onnx),
    ),
    "openvino": Format(
        *("OpenVINO", "openvino_model.xml", 1e-4, "openvino", ("openvino",)), *(_write_openvino, _open_openvino)
    ),
    "torch": Format(*("torch.export", "model.pt2", 1e-5, None, ()), *(_write_torch, _open_torch)),
}


def write(kind: Format, model: nn.Module, images: Tensor, file: Path) -> None:
    """Write a model, which runs in eval mode, as a file of this kind: any batch, height and width of these images.

    Raises:
        CheckpointError: where the exporter cannot, with what it says.
    """
    try:
        with _quiet(), torch.no_grad():  # from torch 2.15 on, an export to ONNX with gradients fails
            kind.write(model, images, file)
    except OSError:
        raise  # a full disk: the folder's own business
    except Exception as error:  # exporters have dozens of errors of their own
        said = in_words(error).strip().splitlines()
        raise CheckpointError(
            f"this model cannot be exported for {kind.runtime}: {type(error).__name__}: {said[0]}. Nothing was written"
        ) from error
