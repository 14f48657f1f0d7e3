"""Does an exported file compute what the model does, and how fast is it?

Two runtimes round differently, and a merge is a choice: where two pairs of tokens cost the same but for rounding, one
runtime may join the one and another the other. The logits of such an image then differ by far more than rounding, and
neither is wrong. So an image that is beyond the tolerance is put to the proof: its choices must change in torch itself
when its pixels change by what rounding amounts to (`rounding_decides`). An image whose choices stand firm there has no
excuse, and few may have one: a wrong file differs on many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from ltm_retrofit.calibrate import difference
from ltm_retrofit.converted.record import is_retrofitted
from ltm_retrofit.errors import CheckpointError
from ltm_retrofit.merging.tokens import Assignment, HardAssignment
from ltm_retrofit.saving.formats import Format, Session
from ltm_retrofit.timing import alternated, quartiles
from ltm_retrofit.tracing import trace

#: images at once while outputs are compared: one, and an odd number that the export has not seen
BATCHES = (1, 3)
#: how many images are also run alone
ALONE = 4
#: the largest share of images that may owe their difference to near-ties; of a few images, one may
SHARE = 0.02
#: of pixels: what rounding amounts to after a dozen blocks, and how often it is tried
NUDGES = (1e-6,) * 4 + (1e-5,) * 4


@dataclass(frozen=True)
class Agreement:
    """How far a runtime's logits are from torch's.

    ``largest`` is the largest difference of a logit, where choices agree, as a share of ``max(1, max|logit|)``.
    ``near_ties`` is how many images differ by more, because rounding decides who merges with whom.
    """

    largest: float
    near_ties: int


def check(session: Session, reference: nn.Module, images: Tensor, kind: Format) -> Agreement:
    """Compare a runtime with the model, on images ``(n, C, H, W)``, at several batch sizes.

    Args:
        session: the opened file.
        reference: the model as `Logits`, in eval mode.
        images: what to compare on.
        kind: of the file; its tolerance holds.

    Raises:
        CheckpointError: where they differ, on which images and by how much.
    """
    away, scale = torch.zeros(len(images)), 1.0
    for batch, count in zip(BATCHES, (min(ALONE, len(images)), len(images)), strict=True):
        for start in range(0, count, batch):
            some = images[start : min(start + batch, count)]
            with torch.no_grad():
                expected = reference(some)
            given = session(some)
            if given.shape != expected.shape or not bool(torch.isfinite(given).all()):
                raise CheckpointError(
                    f"{kind.runtime} puts out {tuple(given.shape)} on a batch of {len(some)}, not finite logits of "
                    f"{tuple(expected.shape)}. Nothing was written"
                )
            scale = max(scale, float(expected.abs().max()))
            off = (given - expected).abs().amax(dim=1)
            away[start : start + len(some)] = torch.maximum(away[start : start + len(some)], off)
    beyond = (away > kind.tolerance * scale).nonzero().flatten().tolist()
    excused = [place for place in beyond if rounding_decides(reference, images[place])] if _few(beyond, images) else []
    if len(excused) < len(beyond):
        worst = max(float(away[place]) for place in beyond)
        raise CheckpointError(
            f"{kind.runtime} computes other logits than the model, on {len(beyond)} of {len(images)} images by up to "
            f"{worst:.2g} of {scale:.2g}, where {kind.tolerance:g} of that is allowed"
            + (f", and {len(excused)} of them hang on rounding" if excused else "")
            + ". Nothing was written. Please report it, with the model's name and the versions of torch and the runtime"
        )
    agreeing = [place for place in range(len(images)) if place not in excused]
    return Agreement(float(away[agreeing].max()) / scale if agreeing else 0.0, len(excused))


def _few(beyond: Sequence[int], images: Tensor) -> bool:
    return len(beyond) <= max(1, int(SHARE * len(images)))


def rounding_decides(reference: nn.Module, image: Tensor) -> bool:
    """Say whether who merges with whom in an image ``(C, H, W)`` changes in torch itself, by changes like rounding's.

    Each pixel is changed by chance, by about a millionth and by about a hundred-thousandth of itself. Only whole
    choices are compared. Masks on a grid make none, and neither does a model that is not converted.
    """
    if not is_retrofitted(reference):
        return False
    generator = torch.Generator().manual_seed(0)
    before = choices(reference, image)
    for nudge in NUDGES:
        noise = 1 + nudge * torch.randn(image.shape, generator=generator)
        after = choices(reference, image * noise)
        if any(not torch.equal(one, other) for one, other in zip(before, after, strict=True)):
            return True
    return False


def choices(reference: nn.Module, image: Tensor) -> list[Tensor]:
    """Return whole numbers that say which tokens each site of a converted model merges in an image."""
    with torch.no_grad(), trace(reference) as traced:
        reference(image.unsqueeze(0))
    found: list[Tensor] = []
    for merge in traced.merges:
        assignment = merge.assignment
        if isinstance(assignment, HardAssignment):
            found += [assignment.of, assignment.kept]
        elif isinstance(assignment, Assignment):
            found += [assignment.kept, assignment.merged, assignment.weights.argmax(dim=-1)]
    return found


def same_answers(session: Session, reference: nn.Module, images: Tensor, batch: int = 8) -> tuple[float, float]:
    """Return the share of images on which a runtime gives the model's answer, and the mean KL to it in nats.

    That is what is asked of int8, whose logits are others.
    """
    with torch.no_grad():
        expected = torch.cat([reference(some) for some in torch.split(images, batch)])
    given = torch.cat([session(some) for some in torch.split(images, batch)])
    differ = difference([expected], [given])
    return 1 - float(differ.other.float().mean()), differ.mean


@dataclass(frozen=True)
class Timed:
    """Median milliseconds of the original's export and of the converted one's, and how many times as fast that is.

    ``speedup`` is lower quartile, median and upper quartile of the paired quotients original / converted.
    """

    original: float
    converted: float
    speedup: tuple[float, float, float]

    def __str__(self) -> str:
        """Return ``105.2 ms → 71.9 ms, 1.46 times as fast (1.43 to 1.50)``."""
        low, middle, high = self.speedup
        return f"{self.original:.1f} ms → {self.converted:.1f} ms, {middle:.2f} times as fast ({low:.2f} to {high:.2f})"


def timed(original: Callable[[], object], converted: Callable[[], object], seconds: float, rounds: int = 20) -> Timed:
    """Time two ways in alternation, after two rounds that warm up, for at most so long or so many rounds."""
    taken = alternated((original, converted), torch.device("cpu"), rounds, seconds=seconds)
    before, after = (median(times[which] for times in taken) for which in (0, 1))
    return Timed(before, after, quartiles([one / other for one, other in taken]))
