"""The shipped models' card, from training.json and results/readability.md: ``python benchmarks/model_card.py``."""

from __future__ import annotations

import json
from pathlib import Path

from llvlit.engine.models import EMBEDDED_FOLDER, embedded_names, load_model
from llvlit.files import write_atomically

READABILITY = Path(__file__).resolve().parent.parent / "results" / "readability.md"
CARD = """\
# Card of the shipped models

Three decoders of the GPT-2 architecture, trained from scratch by `llvlit train` and shipped with the package as float16
safetensors, so that the book and the tests run with no network. They differ in size alone.

{sizes}

## Data

The training part of the Large Movie Review Dataset v1.0 (Maas et al. 2011): {reviews:,} reviews, of which the labelled
half carries the reviewer's rating (1 to 4 or 7 to 10). Its test part was not used. One per cent of the reviews is held
out for the losses below. The tokenizer is a byte-level BPE of 4,096 entries, trained on every fourth review. Corpus
fingerprint {fingerprint}.

Half of the training windows are plain text; the other half are packed with excerpts of rated reviews, each closed by
` Rating: 9/10`, so that the token before the verdict has to carry it.

## Recipe

{steps:,} steps of {n_windows} windows of {length} tokens ({tokens:,} tokens in all); Muon for the layers' matrices,
AdamW for the rest, peak learning rate {learning_rate}, falling linearly to zero over the last {decay:.0%} of the steps;
seed {seed}. A verdict token weighs {verdict_weight:g} in the loss, from step {late_from:,} on {late_verdict_weight:g}.
The commands:

```sh
{commands}
```

Every model saw the same windows in the same order. One thing differs: the first 100 steps of `large` ran under a
longer plan, so that its learning rate rose over 78 steps instead of 54; from step 100 on it followed the recipe.
`llvlit train` refuses such a change now. Computed with {environment}.

## Curves

Held-out loss in nats per token; the whole curve, with the training loss, is in each model's `training.json`, and the
page on the toys plots it. The verdict's loss is noisy (about 40 verdicts); eight equally likely ratings give 2.08.

{curve}

## What they can read

{readability}

## What they cannot do

- They have read film reviews and nothing else. They know no facts, hold no conversation, and lose the thread within a
  sentence or two; greedy continuations repeat themselves.
- Their contexts end at {length} tokens.
- They say nothing about what a model of a hundred million parameters does. The smallest has 64 dimensions: 32 of them
  are half of its stream, not a twenty-fourth as in GPT-2.
- Reviews hold spoilers and abuse, and the models may repeat them.
- Do not use them for anything but studying how models work.
"""


def main() -> None:
    names = [name.removeprefix("embedded/") for name in embedded_names()]
    runs = {name: json.loads((EMBEDDED_FOLDER / name / "training.json").read_text(encoding="utf-8")) for name in names}
    head = "| Model | Parameters | Layers | Hidden size | Heads | Training, hours | Fingerprint |"
    sizes = [head, "|---|---:|---:|---:|---:|---:|---|"]
    for name, run in runs.items():
        model = load_model(f"embedded/{name}", device="cpu")
        size = run["size"]
        sizes.append(
            f"| `embedded/{name}` | {model.n_parameters:,} | {size['n_layers']} | {size['hidden_size']} "
            f"| {size['n_heads']} | {run['seconds'] / 3600:.1f} | {model.fingerprint} |"
        )
    curve = ["| Step | " + " | ".join(f"{name}: plain | rated | verdict" for name in names) + " |"]
    curve.append("|---:|" + "---:|" * (3 * len(names)))
    for rows in zip(*(run["curve"] for run in runs.values()), strict=True):
        step = rows[0]["step"]
        if step % 300 == 0 or step == rows[0]["step"] == runs[names[0]]["recipe"]["steps"]:
            cells = [f"{row[f'held_out_{part}']:.3f}" for row in rows for part in ("plain", "rated", "verdict")]
            curve.append(f"| {step} | " + " | ".join(cells) + " |")
    first = runs[names[0]]
    readability = READABILITY.read_text(encoding="utf-8").split("\n", 2)[2].replace("\n## ", "\n### ").strip()
    card = CARD.format(
        sizes="\n".join(sizes),
        reviews=first["corpus"]["reviews"],
        fingerprint=first["corpus"]["fingerprint"],
        tokens=first["tokens_seen"],
        commands="\n".join(dict.fromkeys(run["command"] for run in runs.values())),
        environment=", ".join(f"{key} {value}" for key, value in first["environment"].items() if key != "commit"),
        curve="\n".join(curve),
        readability=readability,
        **first["recipe"],
    )
    write_atomically(EMBEDDED_FOLDER / "README.md", lambda path: path.write_text(card, encoding="utf-8") and None)


if __name__ == "__main__":
    main()
