"""Which tokens do not depend on the image: class, distillation and register tokens, where they first attend."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ltm_retrofit.finding.example import Example, other_image, run
from ltm_retrofit.finding.recording import Reached, Recording


def same_tokens(model: nn.Module, example: Example, name: str, before: Tensor) -> Tensor | None:
    """Say which tokens another image leaves as they are, ``(N,)``: they enter a module as ``(R, N, D)``.

    None where the model does not take such another image, or makes other tokens of it.
    """
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(next(value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)))
        raise Reached

    handle = model.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run(model, other_image(example))
    except Exception:  # reached, or whatever a model has against the image
        pass
    finally:
        handle.remove()
    if not seen or seen[0].shape != before.shape:
        return None
    same = (seen[0] == before).all(dim=-1)
    return same.all(dim=1 if same.shape[1] == 1 else 0)  # tokens may come before images


def note_constant_tokens(model: nn.Module, example: Example, recording: Recording) -> None:
    """Note how many constant tokens lead and end the sequence that first attends, in whatever way they were joined.

    Past an attention every token depends on the image; what is joined later is noted where ``torch.cat`` joins it.
    """
    first = recording.attended[0]
    for name in reversed(first.chain):
        call = recording.calls[name][0]
        tokens = next((x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)), None)
        if tokens is None or tokens.ndim != 3 or not tokens.is_floating_point() or tokens._version != call.version:
            continue
        found = same_tokens(model, example, name, tokens)
        same = [] if found is None else found.tolist()
        if True in same and False in same:
            recording.joined[len(same)] = same.index(False), same[::-1].index(False)
        return
