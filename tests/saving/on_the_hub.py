"""What a user does with the Hub. A process of its own runs it, whose Hub is the stand-in: see `test_hub.py`."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import timm
import torch
import transformers as tr
from hub import TOKEN
from torch import Tensor, nn

import ltm_retrofit as ltm
import ltm_retrofit.auto

torch.set_num_threads(1)
torch.manual_seed(0)

IMAGES = torch.randn(2, 3, 32, 32)
CONFIG = tr.ViTConfig(
    hidden_size=48,
    num_attention_heads=3,
    image_size=32,
    patch_size=8,
    num_hidden_layers=4,
    intermediate_size=96,
    num_labels=3,
)
TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(IMAGES)
    return out if isinstance(out, Tensor) else out.logits


def converted(host: nn.Module) -> nn.Module:
    return ltm.retrofit(host.eval(), ltm.LTMConfig(flops=0.85))


def moved(model: nn.Module, part: str) -> nn.Module:
    """Change weights, as training would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def refused(error: type[Exception], *said: str) -> Any:
    class Refused:
        def __enter__(self) -> None: ...

        def __exit__(self, kind: type | None, value: BaseException | None, _: Any) -> bool:
            assert isinstance(value, error) and all(word in str(value) for word in said), value
            return True

    return Refused()


def a_model_goes_there_and_back() -> None:
    model = converted(tr.ViTForImageClassification(copy.deepcopy(CONFIG)))
    first = logits(model)
    address = ltm.push_to_hub(model, "user/tiny", token=TOKEN)
    assert "/user/tiny/commit/" in address, address
    assert torch.equal(logits(ltm.from_pretrained("user/tiny")), first)
    moved(model, "classifier")
    ltm.push_to_hub(model, "user/tiny", revision="second", token=TOKEN, commit_message="trained on")
    assert torch.equal(logits(ltm.from_pretrained("user/tiny", revision="second")), logits(model))
    sha = address.rpartition("/")[2]
    for revision in ("main", sha):
        assert torch.equal(logits(ltm.from_pretrained("user/tiny", revision=revision)), first)
    for auto in (tr.AutoModelForImageClassification, tr.AutoModel):
        again = auto.from_pretrained("user/tiny", revision="second")
        assert ltm.is_retrofitted(again) and torch.equal(logits(again), logits(model))
    with refused(ltm.CheckpointError, "'user/tiny' at revision 'third' cannot be fetched"):
        ltm.from_pretrained("user/tiny", revision="third")


def a_private_one_wants_a_token(cache: Path) -> None:
    model = converted(timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY))
    with refused(ltm.CheckpointError, "'user/hidden' cannot be written", "token"):
        ltm.push_to_hub(model, "user/hidden", token="another")
    ltm.push_to_hub(model, "user/hidden", private=True, token=TOKEN)
    with refused(ltm.CheckpointError, "'user/hidden' cannot be fetched", "token"):
        ltm.from_pretrained("user/hidden")
    with refused(ltm.CheckpointError, "local_files_only is set"):
        ltm.from_pretrained("user/hidden", cache_dir=cache, local_files_only=True)
    assert torch.equal(logits(ltm.from_pretrained("user/hidden", cache_dir=cache, token=TOKEN)), logits(model))
    again = ltm.from_pretrained("user/hidden", cache_dir=cache, local_files_only=True)
    assert torch.equal(logits(again), logits(model))


def a_host_pushes_itself_converted() -> None:
    model = converted(tr.ViTForImageClassification(copy.deepcopy(CONFIG)))
    model.push_to_hub("user/by-host", token=TOKEN)
    assert torch.equal(logits(ltm.from_pretrained("user/by-host")), logits(model))
    with refused(ltm.CheckpointError, "push_to_hub of a converted model does not take commit_description"):
        model.push_to_hub("user/by-host", token=TOKEN, commit_description="long")


def what_will_not_load_alone_is_not_sent() -> None:
    model = converted(timm.models.vit_tiny_patch16_224(img_size=32, patch_size=8, depth=4, num_classes=3))
    with refused(ltm.CheckpointError, "allow_unloadable=True"):
        ltm.push_to_hub(model, "user/never", token=TOKEN)
    with refused(ltm.CheckpointError, "expected 'user/name'"):
        ltm.push_to_hub(model, "a/b/c", token=TOKEN)


def an_adapter_fetches_its_base() -> None:
    host = tr.ViTForImageClassification(copy.deepcopy(CONFIG)).eval()
    host.push_to_hub("user/base", token=TOKEN)
    model = converted(tr.AutoModelForImageClassification.from_pretrained("user/base"))
    moved(host, "vit").push_to_hub("user/base", token=TOKEN)  # the base moves on, the adapter stays with the old one
    ltm.push_to_hub(moved(model, ".ltm."), "user/adapter", adapter=True, token=TOKEN)
    assert torch.equal(logits(ltm.from_pretrained("user/adapter")), logits(model))
    again = tr.AutoModelForImageClassification.from_pretrained("user/adapter", local_files_only=True)
    assert torch.equal(logits(again), logits(model))

    host = timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY).eval()
    timm.models.push_to_hf_hub(host, "user/timm-base", token=TOKEN, model_args=TINY, safe_serialization=True)
    model = converted(timm.create_model("hf-hub:user/timm-base", pretrained=True))
    assert torch.equal(model.blocks[0].attn.qkv.weight, host.blocks[0].attn.qkv.weight)
    ltm.save_pretrained(moved(model, ".ltm."), "timm-adapter", adapter=True)
    assert torch.equal(logits(ltm.from_pretrained("timm-adapter")), logits(model))

    found, _ = ltm.saving.load.find_model("user/base")
    ltm.save_pretrained(converted(found), "found-adapter", adapter=True)
    assert torch.equal(logits(ltm.from_pretrained("found-adapter")), logits(found))


if __name__ == "__main__":
    a_model_goes_there_and_back()
    a_private_one_wants_a_token(Path(sys.argv[1]))
    a_host_pushes_itself_converted()
    what_will_not_load_alone_is_not_sent()
    an_adapter_fetches_its_base()
