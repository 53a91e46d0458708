"""A plain model made of an adapter and its base, and what that has cost."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from amid_trl.maths.divergences import kl
from amid_trl.models.loading import load_adapter
from amid_trl.models.pairs import check_adapter
from amid_trl.models.quantised import recorded_base, whole_weights


# Read by both models, to see how far apart they are.
TEXTS = (
    "The river rose in the night, and by morning the lower road was under water.",
    "Question: how many legs do three spiders have? Answer: twenty-four, because each of them has eight.",
    "def mean(values):\n    return sum(values) / len(values)\n",
)


class Merged(NamedTuple):
    """The plain model, and KL(base with adapter || plain model) in nats, the mean over the tokens of TEXTS."""

    model: PreTrainedModel
    kl: float


def merged_model(path: str, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype = torch.float32) -> Merged:
    """The adapter `path` merged into its base in float32, then in `dtype`.

    A quantised base is merged as the weights that its few values stand for: in the few values themselves most of what
    an adapter has learned would be rounded away. So is one that training has quantised, if it has left a record.
    """
    init_kwargs: dict[str, Any] = {"dtype": torch.float32, "device_map": None}
    if (record := recorded_base(path)) is not None:
        init_kwargs["dtype"] = getattr(torch, record["base_dtype"])
        init_kwargs["quantization_config"] = BitsAndBytesConfig.from_dict(record)
    adapted: Any = load_adapter(path, init_kwargs, prepared=whole_weights).eval()
    for config in adapted.peft_config.values():
        check_adapter(config, "model")
    rows = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
    before = [_log_probs(adapted, row) for row in rows]
    plain = adapted.merge_and_unload().to(dtype)
    kls = [kl(log_p, _log_probs(plain, row)) for log_p, row in zip(before, rows, strict=True)]
    return Merged(plain, float(torch.cat(kls).mean()))


@torch.no_grad()
def _log_probs(model: Any, row: Tensor) -> Tensor:
    return model(row).logits[0].double().log_softmax(-1)
