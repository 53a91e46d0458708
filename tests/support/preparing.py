"""Datasets prepared for a trainer, and what is then trained of them."""

from datasets import Dataset, IterableDataset

from amid_trl.data.datasets import prepare_dataset
from amid_trl.data.rows import UNTRAINED, DataSettings


ON_DATASET = DataSettings()
ON_POLICY = DataSettings(generates=True, trains_on_dataset=False)
MIXED = DataSettings(generates=True)

CHAT_PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "The capital of France is Paris.<|im_end|>"


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


CONVERSATION = [user("Is water wet?"), assistant("Yes."), user("Is fire cold?"), assistant("No.")]


def prepared(
    rows: list[dict] | Dataset | IterableDataset, tokenizer, settings: DataSettings = ON_DATASET
) -> list[dict]:
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return list(prepare_dataset(dataset, tokenizer, settings, name="train"))


def trained_spans(row: dict, tokenizer) -> list[str]:
    """The text of every unbroken run of trained tokens."""
    spans, previous = [], UNTRAINED
    for label in row["labels"]:
        if label != UNTRAINED:
            if previous == UNTRAINED:
                spans.append([])
            spans[-1].append(label)
        previous = label
    return [tokenizer.decode(span) for span in spans]


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "amid_trl.data.datasets"]
