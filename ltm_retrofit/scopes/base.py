"""What every interceptor is: a callable in a module's ``__dict__`` that stands in for its ``forward``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ltm_retrofit.merging.tokens import Step

#: name under which masks are registered, and the plan on the model
CHILD = "ltm"


class Record(nn.Module):
    """What a converted model has under the name for masks; where the model is itself a site, its mask lies in here."""

    def __init__(self) -> None:
        super().__init__()
        self.mask: nn.Module | None = None


class Interceptor:
    """Stands in for one module's ``forward``.

    A plain object in the module's ``__dict__``: it pickles and deep-copies with the module then it belongs to the copy.

    Args:
        block: the module it belongs to.
        name: the site it works for.
    """

    #: told of each step while a trace is on; never compiled in
    listener: Callable[[str, Step], None] | None = None
    #: or "identity" (nothing merged: proof (e)) or "original"
    mode = "merge"

    def __init__(self, block: nn.Module, name: str) -> None:
        self.block, self.name = block, name

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is so for a while: nobody would end it for a copy or a pickle."""
        return {key: value for key, value in vars(self).items() if key not in ("listener", "mode")}

    @property
    def __signature__(self) -> inspect.Signature:
        """The host's own, for whoever inspects ``block.forward``."""
        return inspect.signature(type(self.block).forward.__get__(self.block))

    @property
    def host(self) -> nn.Module:
        """The module on which the site's mask is registered."""
        return self.block

    @property
    def mask(self) -> nn.Module | None:
        """The site's mask; None where the site only slices or hands on."""
        child = self.host._modules.get(CHILD)
        return child.mask if isinstance(child, Record) else child

    def put_in_place(self) -> None:
        """Intercept from now on."""
        self.block.__dict__["forward"] = self

    def take_away(self) -> None:
        """Leave the module as it was."""
        del self.block.__dict__["forward"]

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Run the host's own forward."""
        return type(self.block).forward(self.block, *args, **kwargs)
