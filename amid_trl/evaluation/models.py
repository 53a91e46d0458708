"""The models of an evaluation and the rows of its set, in the tokens that they read."""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, cast

import torch
from accelerate import PartialState
from accelerate.utils import align_module_device
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from amid_trl.data.conversations import conversation_row
from amid_trl.data.known_tokens import KnownTokens
from amid_trl.data.rendering import training_template
from amid_trl.data.rows import UNTRAINED, DataSettings, text_row
from amid_trl.evaluation.sets import EvaluationSet, Example
from amid_trl.evaluation.settings import EvaluationSettings
from amid_trl.models.generation import eos_token_ids, sampling_config
from amid_trl.models.gguf import warn_of_gguf
from amid_trl.models.heads import causal_lm
from amid_trl.models.loading import load_causal_lm, load_tokenizer
from amid_trl.models.multimodal import text_model
from amid_trl.models.own_logits import check_own_logits
from amid_trl.models.pairs import check_text_only, common_positions, common_vocabulary
from amid_trl.models.tokenizers import renamed_tokens
from amid_trl.outputs import fingerprint
from amid_trl.run import RenamedTokens


Given = str | PreTrainedModel


class EncodedExample(NamedTuple):
    """An example in tokens: what the model continues, what is scored behind what, and whether the prompt is cut.

    `reference_bytes` is how many bytes of UTF-8 the scored tokens write.
    """

    prompt: Tensor
    context: Tensor
    reference: Tensor
    is_cut: bool
    reference_bytes: int


@dataclass(frozen=True)
class EvaluationModels:
    """The model that is evaluated, the one that it is compared with, and how both read text."""

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    renamed: RenamedTokens = field(default_factory=RenamedTokens)

    @cached_property
    def vocabulary(self) -> int:
        """How many tokens all three know."""
        return common_vocabulary(self.student, self.teacher, self.tokenizer)

    @cached_property
    def ends(self) -> list[int]:
        """The tokens that end a completion."""
        return eos_token_ids(self.tokenizer, causal_lm(self.student).generation_config)

    @property
    def pad(self) -> int:
        """What batches are filled with; any token would do."""
        pad = cast(int | None, self.tokenizer.pad_token_id)
        return self.ends[0] if pad is None else pad

    def sampling(self, settings: EvaluationSettings) -> GenerationConfig:
        """How the student writes: as `settings` say, whatever ships with the model."""
        return sampling_config(
            max_new_tokens=settings.max_new_tokens,
            eos_token_ids=self.ends,
            pad_token_id=self.pad,
            padded_ids=[
                *self.renamed.ids,
                *range(self.vocabulary, causal_lm(self.student).config.get_text_config().vocab_size),
            ],
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=0,
            no_repeat_ngram_size=settings.no_repeat_ngram_size,
        )

    def encode(self, examples: EvaluationSet, max_new_tokens: int) -> list[EncodedExample]:
        """Every example in tokens; ValueError for one that the models have no room or no template for."""
        data = DataSettings(eos_token_ids=tuple(self.ends))
        template = training_template(self.tokenizer)
        room, known = (
            common_positions(self.student, self.teacher),
            KnownTokens(self.tokenizer, self.vocabulary, "model"),
        )
        rows = []
        for number, example in enumerate(examples.examples, start=1):
            where = f"{examples.name}, row {number}"
            try:
                row = _row(example, self.tokenizer, template, data, examples.prompt_tokens, max_new_tokens)
                read = torch.cat([row.prompt, row.context, row.reference])
                self.renamed.check(read)
                known.check(read, "its text")
            except (ValueError, TemplateError) as error:
                raise ValueError(f"{where}: {error}") from error
            if not len(row.reference):
                raise ValueError(f"{where}: the chat template does not show where the answer is")
            if room is not None and len(row.prompt) + max_new_tokens > room:
                raise ValueError(
                    f"{where}: a prompt of {len(row.prompt)} tokens and max_new_tokens={max_new_tokens} are more than "
                    f"the {room} positions of the model"
                )
            rows.append(row)
        return rows


def _row(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    data: DataSettings,
    prompt_tokens: int | None,
    max_new_tokens: int,
) -> EncodedExample:
    """Prompt and first reference as they would be trained; without a trained token the reference is empty."""
    if isinstance(example.prompt, str):
        row, _ = text_row(example.prompt, example.references[0], tokenizer, data)
    else:
        answer = {"role": "assistant", "content": example.references[0]}
        row, _ = conversation_row({"prompt": example.prompt, "completion": [answer]}, tokenizer, template, data)
    ids, prompt = row["input_ids"], row["prompt_ids"]
    trained = [i for i, label in enumerate(row["labels"]) if label != UNTRAINED]
    start, stop = (trained[0], min(trained[-1] + 1, trained[0] + max_new_tokens)) if trained else (0, 0)
    return EncodedExample(
        torch.tensor(prompt[:prompt_tokens]),
        torch.tensor(ids[:start][:prompt_tokens]),
        torch.tensor(ids[start:stop]),
        prompt_tokens is not None and len(prompt) > prompt_tokens,
        _written_bytes(tokenizer, ids[:stop]) - _written_bytes(tokenizer, ids[:start]),
    )


def _written_bytes(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """How many bytes of UTF-8 tokens write; special ones, and a character at the end that is not whole, are none."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(str(text).rstrip("\ufffd").encode())


def open_models(
    model: Given,
    teacher: Given | None,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str,
    trust_remote_code: bool,
) -> EvaluationModels:
    """Models by name, path, or path of an adapter, or in memory; ValueError if they cannot be compared."""
    student = _loaded(model, "model", dtype, trust_remote_code)
    tokenizer = tokenizer or load_tokenizer(student, model, revision=None, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise ValueError(f"no tokenizer lies beside {model_name(model)}")
    warn_of_gguf(tokenizer)
    if teacher is None:
        return EvaluationModels(student, None, tokenizer)
    compared = _loaded(teacher, "teacher", dtype, trust_remote_code)
    other = load_tokenizer(compared, teacher, revision=None, trust_remote_code=trust_remote_code)
    return EvaluationModels(student, compared, tokenizer, renamed_tokens(tokenizer, other))


def _loaded(model: Given, role: str, dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    if isinstance(model, str):
        loaded = load_causal_lm(model, {"dtype": dtype, "trust_remote_code": trust_remote_code}, distributed=False)
        if getattr(causal_lm(loaded), "hf_device_map", None) is None:
            loaded.to(PartialState().device)
        model = cast(PreTrainedModel, loaded)
    alone: PreTrainedModel = text_model(model)
    check_text_only(alone, role)
    check_own_logits(alone, role)
    return alone


def model_name(model: Given) -> str:
    """What a model is called in the results."""
    return model if isinstance(model, str) else causal_lm(model).config._name_or_path or type(model).__name__


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A hash of the configuration and some values of every parameter.

    Enough to tell a model from itself one training step later, and adapters of different `lora_alpha`.
    """
    config = json.loads(causal_lm(model).config.to_json_string(use_diff=False))
    config = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(fingerprint(config).encode())
    for prefix, module in model.named_modules():
        if isinstance(scaling := getattr(module, "scaling", None), dict):  # of LoRA
            digest.update(fingerprint(scaling).encode())
        with align_module_device(module):  # weights that are offloaded while they are not used
            for name, parameter in module.named_parameters(recurse=False):
                values = parameter.detach().flatten()
                digest.update(f"{prefix}.{name}".encode())
                digest.update(values[:: max(1, len(values) // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()
