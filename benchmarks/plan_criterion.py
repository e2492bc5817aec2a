"""What a plan for a classifier goes by: the features of its logits, or the KL of the logits themselves.

    apt install dataset-fashion-mnist
    python benchmarks/plan_criterion.py fashion /usr/share/datasets/fashion-mnist --work fashion_work
    python benchmarks/plan_criterion.py cifar10 package --work cifar_work

Plans for the quickstart's model, and for the classifier that ``cifar10.py`` fine-tunes first (it has to be in the work
folder), are made on 32 training images, two draws of them, and judged on test images: mean KL(original ‖ converted) of
the logits, and the share of images whose top-1 stays; both of the plan itself ("own") and after published methods were
considered ("plan"). ``plan`` goes by the features; for the KL they are hidden here. Takes half an hour on one core.
"""

import argparse
import copy
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import patch

import cifar10
import fashion_trained_out
import record
import torch

from tosa_convert import UsageError, convert, load
from tosa_convert.data.sampling import sample
from tosa_convert.measure import similarity
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning import plan as planning
from tosa_convert.planning.budget import at_budget
from tosa_convert.planning.plan import find_plan

BUDGETS = {"fashion": (0.8, 0.7, 0.6, 0.5, 0.4), "cifar10": (0.5,)}
DRAWS, IMAGES = 2, 32
JUDGED = {"fashion": 400, "cifar10": 160}
PUBLISHED = ("tome", "mctf", "similarity/persist/geometric", "multi_criteria/pool/geometric")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=list(BUDGETS))
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan_criterion.json"))
    arguments = parser.parse_args()
    model, train, test = sources(arguments.source, arguments.data, arguments.work)
    tuning = sample(train, preprocessing_of(model), DRAWS * IMAGES)[0]
    judged = sample(test, preprocessing_of(model), JUDGED[arguments.source])[0]
    known = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    rows = [row for row in known if row["source"] != arguments.source]
    for budget in BUDGETS[arguments.source]:
        for row in measured(model, tuning, judged, budget):
            rows.append({"source": arguments.source, "budget": budget, **row})
            print(rows[-1], flush=True)
            record.write(arguments.out, {"images": IMAGES, "judged": JUDGED, "rows": rows})


def sources(name: str, data: Path, work: Path):
    """The model, a folder of training images and one of test images."""
    module, splits = {"fashion": (fashion_trained_out, ("train", "t10k")), "cifar10": (cifar10, ("train", "test"))}[
        name
    ]
    folders = [module.unpacked(data, work, split) for split in splits]
    model = load("quickstart") if name == "fashion" else cifar10.fine_tuned_base(None, folders[0], work)
    return model, *folders


def measured(model, tuning: torch.Tensor, judged: torch.Tensor, budget: float):
    """A row for each draw and criterion, and for each published method."""
    for draw in range(DRAWS):
        for by in ("features", "kl"):
            consider = patch.object(planning, "against_published", wraps=planning.against_published)
            with by_kl() if by == "kl" else nullcontext(), consider as considered:
                plan = find_plan(model, tuning[draw::DRAWS], budget)
            own = considered.call_args.args[1]
            yield {"by": by, "draw": draw, "own": told(model, own, judged), "plan": told(model, plan, judged)}
    for name in PUBLISHED:
        try:
            yield {"method": name, **judge(model, at_budget(model, name, budget), judged)}
        except UsageError as error:
            yield {"method": name, "refused": str(error)}


def by_kl() -> AbstractContextManager:
    """Within this block nothing is known of the features that logits are made from, so plans go by the KL."""
    return patch.object(similarity, "_before", lambda logits, calls: None)


def told(model, plan, judged: torch.Tensor) -> dict:
    parts = f"{plan.config.score} × {plan.config.bypass} × {plan.config.schedule}"
    return {"convert": parts, **judge(model, convert(copy.deepcopy(model), plan.config), judged)}


def judge(model, converted, images: torch.Tensor) -> dict:
    kl, same = [], []
    for batch in images.split(32):
        with torch.inference_mode():
            wanted, found = (each(batch).log_softmax(-1) for each in (model, converted))
        kl.append((wanted.exp() * (wanted - found)).sum(-1))
        same.append((wanted.argmax(-1) == found.argmax(-1)).float())
    return {"kl": torch.cat(kl).mean().item(), "agreement": torch.cat(same).mean().item()}


if __name__ == "__main__":
    main()
