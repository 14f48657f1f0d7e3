"""Here what settings leave open is that of a plain run on labels; what is recommended is tested by its name."""

from __future__ import annotations

import pytest

from ltm_retrofit.tuning import settings


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train all weights on labels, whatever is recommended."""
    monkeypatch.setattr(settings, "TAUGHT", settings.UNTAUGHT)
    monkeypatch.setattr(settings, "pace", lambda images, **_known: {"epochs": 1, "batch_size": 64, "lr": 3e-4})
