"""The teacher of `amid-trl serve-teacher`: a model in memory that answers questions about rows of tokens."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from amid_trl.data.batches import pad_rows
from amid_trl.models.heads import backbone_states, causal_lm, language_model_head
from amid_trl.models.loading import load_causal_lm, load_tokenizer
from amid_trl.models.own_logits import check_own_logits
from amid_trl.models.pairs import check_start, check_text_only, common_positions, freeze
from amid_trl.models.quantised import compare_base
from amid_trl.models.tokenizers import tokenizer_fingerprint
from amid_trl.teacher.exchange import AboutTeacher, Question
from amid_trl.teacher.loading import bitsandbytes_config


# What a configuration says that has no part in what the model computes, or that its weights say.
_UNREAD = ("_name_or_path", "architectures", "dtype", "transformers_version")


@dataclass(frozen=True)
class Hosting:
    """Which teacher is served, and how it is loaded; `dtype` is a torch dtype's name, or auto: the checkpoint's."""

    name: str
    revision: str | None = None
    dtype: str = "auto"
    device_map: Any = None
    bits: Literal[4, 8] | None = None
    adapter: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Bounds:
    """Of one request, and of one pass of the model, which has a row at least."""

    max_rows: int
    max_tokens: int
    max_body_bytes: int
    pass_tokens: int


class Loaded(NamedTuple):
    """A frozen model, the tokenizer beside it, and the model's `identity`."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    identity: str


def load_hosted(hosting: Hosting) -> Loaded:
    """The teacher as training would load it; a ValueError if the loss could not read it."""
    where: Any = {"revision": hosting.revision, "trust_remote_code": hosting.trust_remote_code}
    init_kwargs = {**where, "dtype": hosting.dtype}
    if hosting.device_map is not None:
        init_kwargs["device_map"] = hosting.device_map
    if hosting.bits is not None:
        product = torch.bfloat16 if hosting.dtype == "auto" else getattr(torch, hosting.dtype)
        init_kwargs["quantization_config"] = bitsandbytes_config(hosting.bits, product)
    model = load_causal_lm(hosting.name, init_kwargs, distributed=False)
    tokenizer = load_tokenizer(model, hosting.name, **where)
    if hosting.adapter is not None:
        model = _adapted(model, hosting)
    check_text_only(model, "teacher")
    base = causal_lm(model)
    stays = getattr(base, "hf_device_map", None) is not None or getattr(base, "is_quantized", False)
    if not stays and torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    known = identity(freeze(model))
    check_own_logits(model, "teacher")
    return Loaded(model, tokenizer, known)


def _adapted(model: nn.Module, hosting: Hosting) -> nn.Module:
    from peft import PeftConfig, PeftModel

    if causal_lm(model) is not model:
        raise ValueError(f"{hosting.name} is an adapter already; give its base, or leave --adapter out")
    adapter = str(hosting.adapter)
    check_start(PeftConfig.from_pretrained(adapter), f"adapter {adapter}")
    base: Any = model
    adapted = PeftModel.from_pretrained(base, adapter)
    compare_base(adapter, adapted)
    return adapted


class HostedTeacher:
    """A frozen model that gives its last hidden states, those that its head multiplies."""

    def __init__(self, loaded: Loaded, bounds: Bounds):
        model, self.tokenizer, self._identity = loaded
        self.bounds = bounds
        self._base: Any = causal_lm(model)
        self.head = language_model_head(self._base)
        self._positions = common_positions(model)
        self._vocabulary = self._base.config.get_text_config().vocab_size
        ends: Any = (
            getattr(self.tokenizer, name, None) if self.tokenizer is not None else None
            for name in ("pad_token_id", "eos_token_id")
        )
        self._pad = next((token for token in ends if token is not None), 0)

    def about(self, hosting: Hosting, head: str) -> AboutTeacher:
        """Who it is, with its `head` in a file of that hash."""
        row = torch.zeros(2, dtype=torch.int32)
        states = self(Question.of([row], [row == 0]))
        name = hosting.name if hosting.adapter is None else f"{hosting.name} with {hosting.adapter}"
        return AboutTeacher(
            name=name,
            revision=hosting.revision,
            identity=self._identity,
            tokenizer=None if self.tokenizer is None else tokenizer_fingerprint(self.tokenizer),
            vocabulary=len(self.head.weight),
            dim=states.shape[1],
            dtype=str(states.dtype).removeprefix("torch."),
            positions=self._positions,
            head=head,
            scale=self.head.finish.scale,
            softcap=self.head.finish.softcap,
            max_rows=self.bounds.max_rows,
            max_tokens=self.bounds.max_tokens,
            max_body_bytes=self.bounds.max_body_bytes,
        )

    def check(self, question: Question) -> None:
        """ValueError if it has a token or a row that the model does not read; its size is the server's business."""
        if not 0 <= int(question.ids.min()) <= int(question.ids.max()) < self._vocabulary:
            found = int(question.ids.min()), int(question.ids.max())
            raise ValueError(f"token ids are from 0 to {self._vocabulary - 1}; got {found[0]} to {found[1]}")
        if self._positions is not None and max(question.lengths) > self._positions:
            raise ValueError(
                f"the teacher reads rows of at most {self._positions} tokens; got {max(question.lengths)}"
            )

    @torch.no_grad()
    def __call__(self, question: Question) -> Tensor:
        """The states (asked, dim) at the asked tokens, rows one after the other; rows of a length run together."""
        lengths = question.lengths
        rows, asked = question.ids.split(lengths), question.asked.split(lengths)
        found: dict[int, Tensor] = {}
        for places in passes(lengths, self.bounds.pass_tokens):
            ids, mask = pad_rows([rows[place] for place in places], self._pad)
            hidden = backbone_states(self._base, ids.to(self._base.device), mask.to(self._base.device))
            for place, states in zip(places, hidden, strict=True):
                found[place] = states[: lengths[place]][asked[place].to(states.device)].cpu()
        return torch.cat([found[place] for place in range(len(rows))])


def passes(lengths: list[int], pass_tokens: int) -> Iterator[list[int]]:
    """Places of rows that run together: sorted by length, of at most so many tokens with their padding, or one."""
    together: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if together and (len(together) + 1) * lengths[place] > pass_tokens:
            yield together
            together = []
        together.append(place)
    yield together


def identity(model: nn.Module) -> str:
    """A hash of all weights and buffers, as they lie in memory, and of the configuration.

    The same for the same checkpoint, loaded in the same way. Weights that a device map has put on disk are read. Asked
    before the model has run: bitsandbytes packs 4-bit weights for a CPU then, and its state would be another one.
    """
    base = causal_lm(model)
    config = json.loads(base.config.to_json_string())
    read = {name: value for name, value in config.items() if name not in _UNREAD}
    hashed = hashlib.sha256(f"{type(base).__name__} {json.dumps(read, sort_keys=True)}".encode())
    for prefix, module in model.named_modules():
        with align_module_device(module):
            for name, tensor in sorted(_own_tensors(module).items()):
                content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                hashed.update(f"{prefix}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                hashed.update(content)
    return hashed.hexdigest()


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Those of a module without its children; bitsandbytes' scales are in its layers' states alone."""
    own: dict[str, Any] = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    if next(module.children(), None) is None:
        own |= module.state_dict()
    return {name: tensor for name, tensor in own.items() if isinstance(tensor, Tensor)}
