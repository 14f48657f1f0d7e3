"""Models go to the Hugging Face Hub and come back: against a stand-in of its HTTP API, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from saving.hub import running

STEPS = Path(__file__).parent / "on_the_hub.py"


def test_models_go_to_the_hub_and_come_back(tmp_path: Path) -> None:
    with running() as hub:
        here = {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # a protocol of its own, which the stand-in does not speak
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": os.pathsep.join([str(STEPS.parents[2]), str(STEPS.parent)]),
        }
        command = [sys.executable, str(STEPS), str(tmp_path / "cache")]
        run = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **here}, capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, run.stderr[-3000:]
        assert set(hub.branches) == {f"user/{name}" for name in "tiny hidden by-host base adapter timm-base".split()}
        assert set(hub.branches["user/tiny"]) == {"main", "second"} and hub.private == {"user/hidden"}
        card = hub.commits[hub.branches["user/tiny"]["main"]]["README.md"].decode()
        assert 'ltm.from_pretrained("user/tiny")' in card
        assert 'AutoModelForImageClassification.from_pretrained("user/tiny")' in card
        card = hub.commits[hub.branches["user/adapter"]["main"]]["README.md"].decode()
        assert "base_model: user/base" in card and 'ltm.from_pretrained("user/adapter")' in card
