"""A model that was counted or probed is left as it was found, and so is everything around it."""

from __future__ import annotations

import logging
import warnings

import pytest
import timm
import torch
from pieces import TOKENS, Calls
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from ltm_retrofit.errors import CountError, ExampleError
from ltm_retrofit.macs import count_macs
from ltm_retrofit.undisturbed import undisturbed


class Restless(nn.Module):
    """Leaves traces wherever a forward pass can leave one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))
        self.cache: dict[str, Tensor] = {}
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = torch.rand(3)
        self.cache["x"] = x
        self.log.append(1)
        self.fresh = x
        return self.norm(self.inner(x.mul_(2)))


def snapshot(model: nn.Module) -> dict[str, object]:
    hooks = {
        name: {key: list(value) for key, value in m.__dict__.items() if "hooks" in key and value is not None}
        for name, m in model.named_modules()
    }
    return {
        "flags": {name: module.training for name, module in model.named_modules()},
        "hooks": hooks,
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "objects": {key: id(value) for key, value in (*model.named_parameters(), *model.named_buffers())},
        "grad": {key: (value.requires_grad, value.grad) for key, value in model.named_parameters()},
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    torch.testing.assert_close(after.pop("state"), before.pop("state"), rtol=0, atol=0)
    assert after == before


class TestNothingChanges:
    @pytest.mark.parametrize("fails", [False, True], ids=["counted", "refused"])
    @pytest.mark.parametrize("name", ["restless", "timm_levit", "hf_vit"])
    def test_model(self, name: str, fails: bool) -> None:
        example: Tensor | dict[str, object]
        if name == "restless":
            model, example = Restless(), TOKENS.clone()
        elif name == "timm_levit":
            model = timm.create_model("levit_128s", img_size=64, depth=(1, 1, 1))
            example = torch.randn(1, 3, 64, 64)
        else:
            size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
            model = ViTForImageClassification(
                ViTConfig(**size, image_size=32, patch_size=8, attn_implementation="sdpa")
            )
            example = {"pixel_values": torch.randn(1, 3, 32, 32), "output_hidden_states": True}
        model = nn.ModuleDict({"it": model})["it"].train()
        next(model.children()).eval()  # flags are each module's own
        seen: list[str] = []
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        last.register_forward_hook(lambda module, args, output: seen.append("called"))
        if fails:
            last.register_forward_hook(lambda module, args, output: output + torch.linalg.svdvals(output)[..., :1])
        before, kept = snapshot(model), TOKENS.clone() if name == "restless" else None
        torch.manual_seed(3)
        random = torch.get_rng_state()
        if fails:
            with pytest.raises((CountError, ExampleError)):
                count_macs(model, example)
        else:
            count_macs(model, example)
        assert seen, "the user's hooks run"
        assert torch.equal(torch.get_rng_state(), random)
        assert_same(before, snapshot(model))
        if name == "restless":
            assert not model.cache and not model.log and torch.equal(example, kept)

    def test_undisturbed_by_itself(self) -> None:
        """The probe uses it: eval mode inside, a user's own hooks keep working."""
        model, called = Restless(), []
        handle = model.inner.register_forward_hook(lambda *_: called.append(1))
        before, random = snapshot(model), torch.get_rng_state()
        with pytest.raises(ZeroDivisionError), undisturbed(model):
            assert not any(module.training for module in model.modules())
            assert not torch.backends.mha.get_fastpath_enabled()
            model(TOKENS.clone())
            _ = 1 / 0
        assert called and torch.equal(torch.get_rng_state(), random)
        assert_same(before, snapshot(model))
        handle.remove()
        assert not model.inner._forward_hooks

    def test_after_a_failed_trace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """fvcore leaves its hooks on every module when the traced call raises."""

        def raise_in_trace(x: Tensor) -> Tensor:
            if torch.jit.is_tracing():
                raise ValueError("not while tracing")
            return x

        model = Calls(raise_in_trace)
        before = snapshot(model)
        with pytest.raises(CountError, match=r"cannot trace Calls.*not while tracing"):
            count_macs(model, TOKENS)
        assert_same(before, snapshot(model))

    def test_attention_fast_path_switch(self) -> None:
        for enabled in (True, False):
            torch.backends.mha.set_fastpath_enabled(enabled)
            try:
                count_macs(Calls(lambda x: x), TOKENS)
                with pytest.raises(CountError):
                    count_macs(Calls(lambda x: torch.fft.rfft2(x).real), TOKENS)
                assert torch.backends.mha.get_fastpath_enabled() is enabled
            finally:
                torch.backends.mha.set_fastpath_enabled(True)

    def test_grad_mode_and_grads(self) -> None:
        model = Calls(lambda x: x)
        count_macs(model, TOKENS.clone().requires_grad_())
        assert torch.is_grad_enabled() and model.inner.weight.grad is None
        model(TOKENS).sum().backward()

    def test_quiet(self, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            count_macs(Calls(lambda x: x.reshape(int(x.shape[0]) * 5, -1) if bool((x == x).all()) else x), TOKENS)
        assert not caplog.records
        assert capfd.readouterr() == ("", "")
