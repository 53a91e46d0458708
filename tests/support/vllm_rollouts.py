"""A run whose windows vLLM writes in this process, on a CPU (see tests/vllm/test_rollouts.py)."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from observe import LORA, Windows, completions_of
from peft import LoraConfig
from tiny import messages_dataset, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_trl import AMiDConfig, AMiDTrainer


def keep_weights() -> None:
    """Have vLLM multiply by the weights themselves, which on some CPUs it packs for a kernel of its own, and drops."""
    from vllm.model_executor.layers import utils

    def plain(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = plain


def main(folder: Path, student: str, *, keeps_weights: bool, lora: bool) -> dict[str, Any]:
    """What was written and trained, or the error."""
    if keeps_weights:
        keep_weights()
    tokenizer = AutoTokenizer.from_pretrained(student)
    trainer = AMiDTrainer(
        AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        tiny_llama(tokenizer, seed=1),
        AMiDConfig(
            str(folder),
            **{"use_cpu": True, "bf16": False, "per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1},
            **{"learning_rate": 1.0, "optim": "sgd", "lmbda": 1.0, "max_new_tokens": 12, "report_to": []},
            **{"save_strategy": "no", "disable_tqdm": True, "objective": "kd"},
            **{"use_vllm": True, "max_length": 100, "vllm_max_model_length": 128, "vllm_gpu_memory_utilization": 0.1},
        ),
        train_dataset=messages_dataset(8),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    windows = Windows(trainer)
    before = _log_probs(trainer, trainer.model)
    seen: dict[str, Any] = {"packs": any(weight.numel() == 0 for weight in _engines_model(trainer).parameters())}
    try:
        trainer.train()
    except Exception as error:
        return {**seen, "error": f"{type(error).__name__}: {error}"}
    after = _log_probs(trainer, trainer.model)
    prompts = [[5, 6, 7, 8, 9], [40, 41, 42]]
    trainer._parts.writers["student"]._engine.sync_weights()
    written = _engine_writes(trainer, prompts)
    return {
        **seen,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "completions": [completions_of(window) for window in windows.windows],
        "engine": [log_p for _, log_p in written],
        "student": [after(prompt, ids) for prompt, (ids, _) in zip(prompts, written, strict=True)],
        "untrained": [before(prompt, ids) for prompt, (ids, _) in zip(prompts, written, strict=True)],
        "dtype": str(_llm(trainer).llm_engine.model_config.dtype),
    }


def _llm(trainer: AMiDTrainer) -> Any:
    return trainer._parts.writers["student"]._engine.llm


def _engines_model(trainer: AMiDTrainer) -> torch.nn.Module:
    return _llm(trainer).llm_engine.model_executor.driver_worker.model_runner.model


def _engine_writes(trainer: AMiDTrainer, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Tokens, and what the engine says of each that it drew."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=1.0, max_tokens=24, logprobs=0, ignore_eos=True, seed=0)
    outputs = _llm(trainer).generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    return [
        (list(one.token_ids), [p[t].logprob for t, p in zip(one.token_ids, one.logprobs, strict=True)])
        for one in answers
    ]


def _log_probs(trainer: AMiDTrainer, model: Any) -> Any:
    """The student as it is now: the log-probabilities of the tokens behind a prompt."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def of(prompt: list[int], ids: list[int]) -> list[float]:
        now = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(state)
        logits = model.eval()(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
        model.load_state_dict(now)
        return logits.log_softmax(-1)[range(len(ids)), ids].tolist()

    return of


if __name__ == "__main__":
    out, given = Path(sys.argv[1]), json.loads(sys.argv[2])
    out.with_suffix(".json").write_text(json.dumps(main(out, **given)))
