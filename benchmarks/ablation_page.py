"""docs/ablation.md: the runs of ablation.jsonl as tables, with differences paired by image."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import ablation_base as base
from ablation_arms import ALL, ARMS, DISTILL, PROGRAMME, RATES, VARIATIONS

Runs = list[dict[str, Any]]
#: pairs of arms that the page sets against each other
AGAINST = (
    ("LTM, CE + CEB", "LTM, CE"),
    ("LTM, CE + IBB", "LTM, CE"),
    ("LTM, distillation + CEB", "LTM, distillation"),
    ("LTM, CE", "ToMe, CE"),
    ("LTM, CE + CEB", "ToMe, CE"),
    ("LTM, distillation", "ToMe, distillation"),
    ("LTM, distillation + CEB", "ToMe, distillation"),
    ("LTM, CE", "average pooling, CE"),
)


def kind_of(line: dict[str, Any]) -> str:
    """Say on what kind of machine a run was made: with the same seed another one comes to other weights."""
    return "GPU" if line["hardware"].startswith("NVIDIA") else "CPU"


def paired(one: Runs, other: Runs) -> tuple[float, float]:
    """Return the mean difference in points and its standard error: over seeds and machines, paired by image.

    An arm with one run, as one that is not tuned, has it stand against each seed of the other.
    """
    runs = [{(kind_of(line), line["seed"]): line["right"] for line in lines} for lines in (one, other)]
    single = min(map(len, runs)) == 1
    if not single and not set(runs[0]) & set(runs[1]):  # on other machines
        runs = [{("", seed): right for (_, seed), right in known.items()} for known in runs]
    seeds = sorted(max(runs, key=len) if single else set(runs[0]) & set(runs[1]))
    rows = []
    for seed in seeds:
        first, second = (known[seed] if len(known) > 1 else next(iter(known.values())) for known in runs)
        rows.append([(a == "x") - (b == "x") for a, b in zip(first, second, strict=True)])
    images = [fmean(column) for column in zip(*rows, strict=True)]
    return 100 * fmean(images), 100 * stdev(images) / len(images) ** 0.5


def difference(one: Runs, other: Runs) -> str:
    return "{:+.2f} ± {:.2f}".format(*paired(one, other))


def write_page(lines: Runs, out: Path) -> None:
    """Write all settings of the log as Markdown tables, and print them."""
    arms, rates = list(ARMS), ", ".join(f"{rate:g}" for rate in RATES)
    labels = "with" if DISTILL["labels"] else "without"
    distilled = ", ".join(f"`{key}={value:g}`" for key, value in DISTILL.items() if key != "labels")
    curve = [json.loads(line) for line in (base.HERE / "ablation_base.jsonl").read_text(encoding="utf-8").splitlines()]
    hardware = "; ".join(sorted({x["hardware"] for x in lines}))
    page = [
        "# Ablation",
        "",
        "Made by `benchmarks/ablation_base.py`, then `ablation.py run` and `table`, from `benchmarks/ablation.jsonl`.",
        f"Hardware: {hardware}.",
        "",
        f"Base: {base.ARCHITECTURE} {base.MODEL_ARGS}, trained {curve[-1]['epoch']} epochs on {ALL:,}",
        f"CIFAR-10 images, test accuracy {curve[-1]['test']:.2f} %. Every arm was tuned with the rates {rates}; the",
        f"best after one epoch, on {base.ASIDE:,} training images set aside, was run with the seeds, for the epochs",
        "of the heading, and read the test images once. All",
        f"other settings are `TrainConfig`'s defaults, but *distillation* sets {distilled} and learns",
        f"{labels} labels. Differences are means over the seeds, paired by test image, ±",
        "their standard error; of arms that ran on a GPU and on a CPU, those of one kind of machine are paired, where",
        "there are such. The *control* of an arm is the better of the untouched original and the original given",
        "the same fine-tune. ToMe merges in every block, as published; LTM where the default plan does.",
        "IB = I(X̃;X) − I(X̃;Y) in nats, on test images, clusters fitted to the images set aside.",
        "What masks of the first version came to, with what else was tried on them, has",
        "[a page of its own](ablation_mask_1.md). The options of *gate*, *counts annealed* and *bound at every site*",
        "brought nothing and are gone: the last commit that had them is 56bc864.",
    ]
    lines = chosen(lines)
    settings = sorted({(x["flops"], x["epochs"], x["images"]) for x in lines if x["flops"] < 1 and x["epochs"]})
    for flops, epochs, images in reversed(settings):
        alike = [x for x in lines if (x["epochs"], x["images"]) == (epochs, images) or not x["epochs"]]
        here = [x for x in alike if x["flops"] in (flops, 1)]
        page += ["", f"## ×{flops:g} of the multiply-adds, {epochs} epoch{'s' * (epochs > 1)} of {images:,} images", ""]
        page += main_table(here, arms) + variations(here)
    page += untuned(lines) + plateau(lines) + not_run(lines)
    out.write_text("\n".join(page) + "\n", encoding="utf-8")
    print("\n".join(page))


def untuned(lines: Runs) -> list[str]:
    """Say what conversion alone costs."""
    tests = [x for x in lines if x["stage"] == "test" and not x["epochs"]]
    original = [x for x in tests if x["flops"] == 1]
    page = ["", "## Off the shelf", "", "| MACs | arm | tokens after each block | top-1 % | to the original |"]
    page.append("|---|---|---|---|---|")
    for x in sorted((x for x in tests if x["flops"] < 1), key=lambda x: (-x["flops"], x["arm"])):
        tokens = ", ".join(f"{site.removeprefix('blocks.')}: {count}" for site, count in x["tokens"].items())
        share = f"×{x['macs'] / original[0]['macs']:.3f}"
        page.append(f"| {share} | {x['arm']} | {tokens} | {x['accuracy']:.2f} | {difference([x], original)} |")
    return page


def plateau(lines: Runs) -> list[str]:
    """Say what each fine-tune does to the unconverted network: a base at its plateau stays where it is."""
    tests = [x for x in lines if x["flops"] == 1 and x["stage"] == "test"]
    page = ["", "## The unconverted network, tuned", ""]
    page += ["| arm | images | epochs | rate | top-1 % (seeds) | to the untouched one |", "|---|---|---|---|---|---|"]
    untouched = [x for x in tests if not x["epochs"]]
    for arm, images, epochs in sorted({(x["arm"], x["images"], x["epochs"]) for x in tests if x["epochs"]}):
        runs = [x for x in tests if (x["arm"], x["images"], x["epochs"]) == (arm, images, epochs)]
        cells = [arm, f"{images:,}", str(epochs), f"{runs[0]['rate']:g}", seeds_of(runs), difference(runs, untouched)]
        page.append(f"| {' | '.join(cells)} |")
    return page


def seeds_of(runs: Runs) -> str:
    """Return the mean accuracy and, where there are several, that of each seed."""
    kinds = sorted({kind_of(x) for x in runs}, reverse=True)
    values = [", ".join(f"{x['accuracy']:.2f}" for x in runs if kind_of(x) == kind) for kind in kinds]
    each = f" ({'; on a CPU '.join(values)})" if len(runs) > 1 else ""
    return f"{fmean(x['accuracy'] for x in runs):.2f}{each}"


def not_run(lines: Runs) -> list[str]:
    """List what the programme holds and the log does not."""
    done = {(x["flops"], x["epochs"], x["images"], x["arm"]) for x in lines if x["stage"] in ("test", "vary")}
    page = []
    for flops, epochs, images, names in PROGRAMME:
        missing = [arm for arm in names if (flops, epochs, images, arm) not in done]
        if missing:
            page.append(f"- ×{flops:g}, {epochs} epoch{'s' * (epochs > 1)} of {images:,} images: {'; '.join(missing)}")
    return ["", "## In the programme, not run yet", "", *page] if page else []


def chosen(lines: Runs) -> Runs:
    """Leave out tests at a rate that is not the best any more: a rate was added to the grid since."""
    best: dict[tuple[Any, ...], tuple[float, float]] = {}
    for x in lines:
        if x["stage"] == "choose" and x["rate"] in ARMS[x["arm"]].rates:
            key = x["arm"], x["flops"], x["images"]
            best[key] = max(best.get(key, (0.0, 0.0)), (x["accuracy"], -x["rate"]))
    rates = {key: -rate for key, (_, rate) in best.items()}
    return [x for x in lines if x["stage"] != "test" or x["rate"] == rates.get((x["arm"], x["flops"], x["images"]), 0)]


def control_of(arm: str, tests: dict[str, Runs]) -> str:
    """Name the better of the untouched original and the original given an arm's fine-tune."""
    tuned = "original, tuned, distillation" if "distillation" in arm else "original, tuned"
    controls = ["original", *([tuned] if tests[tuned] and "not tuned" not in arm else [])]
    return max(controls, key=lambda name: fmean(x["accuracy"] for x in tests[name]))


def main_table(here: Runs, arms: list[str]) -> list[str]:
    tests = {arm: [x for x in here if x["arm"] == arm and x["stage"] == "test"] for arm in arms}
    macs = {arm: next((x["macs"] for x in here if x["arm"] == arm), 0) for arm in arms}
    alone = not any(x["epochs"] for arm in arms if arm.startswith("original") for x in tests[arm])
    page = ["The original was not given this fine-tune.", ""] if alone else []
    page += [
        "| arm | rate | MACs | top-1 % (seeds) | control | to the control | IB | I(X̃;X) | I(X̃;Y) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, runs in tests.items():
        if not runs:
            continue
        control = control_of(arm, tests)
        gap = ["", ""] if arm == control else [control, difference(runs, tests[control])]
        known = [f"{fmean(x[key] for x in runs):.3f}" for key in ("ib", "i_input", "i_label")]
        cells = [arm, f"{runs[0]['rate']:g}" if runs[0]["rate"] else "", f"×{macs[arm] / macs['original']:.3f}"]
        page.append(f"| {' | '.join([*cells, seeds_of(runs), *gap, *known])} |")
    pairs = [(one, other) for one, other in AGAINST if tests[one] and tests[other]]
    if pairs:
        page += ["", "| one | against | difference |", "|---|---|---|"]
        page += [f"| {one} | {other} | {difference(tests[one], tests[other])} |" for one, other in pairs]
    return page


def variations(here: Runs) -> list[str]:
    """Compare each variation with its arm at the same rate, on the images set aside."""
    of_arm = {name: of for name, (of, *_) in VARIATIONS.items()}
    tried = sorted({x["arm"]: None for x in here if x["stage"] == "vary"}, key=list(of_arm).index)
    if not tried:
        return []
    page = [
        "",
        "What else was tried, on the images set aside (nothing here was chosen on test images); the arm itself has",
        "one run, and *loss* is the cross-entropy:",
        "",
        "| variation | of | rate | seeds | top-1 % | to the arm itself | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in tried:
        of = of_arm[arm]
        for rate in sorted({x["rate"] for x in here if x["arm"] == arm}):
            runs = [x for x in here if (x["arm"], x["rate"]) == (arm, rate)]
            own = [x for x in here if (x["arm"], x["stage"], x["rate"]) == (of, "choose", rate)]
            loss = f"{fmean(x['loss'] for x in runs):.4f}" if all("loss" in x for x in runs) else ""
            cells = [arm, of, f"{rate:g}", str(len(runs)), f"{fmean(x['accuracy'] for x in runs):.2f}"]
            page.append(f"| {' | '.join([*cells, difference(runs, own), loss])} |")
    return page
