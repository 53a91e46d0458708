"""The same rows trained under an engine or under none; as a script, one process of several (see engines.py)."""

import gc
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from families import family_model
from gatherings import watch_writing
from observe import Windows, completions_of
from peft import LoraConfig, get_peft_model
from small_tokenizers import special_behind
from tiny import (
    CORPUS,
    QUESTIONS,
    chat_prompt_only_dataset,
    messages_dataset,
    multi_turn_dataset,
    save_tiny,
    tiny_gpt2,
    tiny_llama,
    tiny_tokenizer,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GPT2Model
from transformers.models.opt.modeling_opt import OPTDecoder

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl.data.batches import DistillationCollator
from amid_trl.teacher.filling import FillingTeacher
from amid_trl.training.checkpoints import runs_under
from amid_trl.training.fill_cache import cache_teacher


LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def zero(stage: int) -> dict:
    """Like accelerate's configuration of that stage, but tiny models are sharded too, and stay so between uses."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }


# Fields of a teacher by name that are paths: in the folder of the models, or of the case.
IN_MODELS, IN_CASE = ("teacher_model_name_or_path", "teacher_adapter_path"), ("teacher_cache",)
# What AMiDConfig has to be told.
ENGINES = {
    "ddp": {},
    "zero1": {"deepspeed": zero(1)},
    "zero2": {"deepspeed": zero(2)},
    "zero3": {"deepspeed": zero(3)},
    "fsdp2": {"fsdp": True},
}


def save_models(folder: Path) -> None:
    """Everything that a case can name.

    A student with a head of its own, one with a tied head, an adapter of each, one that a word breaks, a mixture of
    experts, one that is read wrongly, two of other architectures, and a teacher for all; their vocabularies are
    padded. Plain text whose blocks are all the same, and some whose blocks differ.
    """
    tokenizer = tiny_tokenizer()
    for name, tied in (("student", False), ("tied_student", True)):
        student = tiny_llama(tokenizer, vocab_size=364, tie_word_embeddings=tied)
        # Every other token ends a completion, so that lengths differ.
        student.generation_config.eos_token_id = list(range(1, len(tokenizer), 2))
        base = AutoModelForCausalLM.from_pretrained(save_tiny(folder / name, student, tokenizer))
        head = {} if tied else {"modules_to_save": ["lm_head"]}
        adapter = get_peft_model(base, LoraConfig(**LORA, **head))
        adapter.save_pretrained(folder / name.replace("student", "adapter"))
    student = tiny_llama(tokenizer, vocab_size=364)
    with torch.no_grad():
        student.model.embed_tokens.weight[tokenizer(" cold")["input_ids"][-1]] = math.nan
    save_tiny(folder / "broken_student", student, tokenizer)
    save_tiny(folder / "mixture", family_model("mixtral", tokenizer, vocab_size=364), tokenizer)
    save_tiny(folder / "scaled", family_model("mpt", tokenizer, logit_scale=0.5), tokenizer)
    save_tiny(folder / "gpt2", tiny_gpt2(tokenizer), tokenizer)
    save_tiny(folder / "opt", family_model("opt", tokenizer, vocab_size=364), tokenizer)
    save_tiny(folder / "teacher", tiny_llama(tokenizer, seed=1, hidden_size=48, vocab_size=368), tokenizer)
    other = special_behind()
    save_tiny(folder / "other_teacher", tiny_llama(other, seed=1, hidden_size=48), other)
    for name, texts in (("same_text", 40 * [one_block(tokenizer)]), ("text", 4 * CORPUS)):
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def one_block(tokenizer) -> str:
    """79 tokens, which make a block of 80 with the EOS behind them."""
    text = "rain"
    while (length := len(tokenizer(text)["input_ids"])) < 79:
        text += " fell" if length < 70 else "!"
    return text


def run(
    models: Path,
    output_dir: Path,
    *,
    evaluates_first: bool = False,
    trains: bool = True,
    resumes: str | None = None,
    late: bool = False,
    **settings,
) -> dict:
    """Train one epoch if asked to, evaluate, save the student; returns what was logged and seen.

    `resumes` names the case whose second step the run goes on from; `settings` are those of `build`. A
    `teacher_cache` is written first, by all processes. A `late` student does not run before it is trained.
    """
    if "teacher_cache" in settings:
        settings["teacher_cache"] = str(output_dir / settings["teacher_cache"])
    if "teacher_cache" in settings and not settings.get("teacher_cache_fill"):
        in_memory = {name: value for name, value in settings.items() if not name.startswith("teacher_")}
        caching = build(models, output_dir, **in_memory)
        caching.args.teacher_cache_states = settings.get("teacher_cache_states", False)
        cache_teacher(caching, settings["teacher_cache"], settings.get("teacher_top_k", 100), "float32")
        settings["teacher"] = None
    with running_nowhere(settings["student"]) if late else nullcontext():
        trainer = build(models, output_dir, **settings)
    seen, filled = Windows(trainer), fillings(trainer)
    if evaluates_first:
        trainer.evaluate()
    if trains:
        trainer.train(None if resumes is None else str(output_dir.parent / resumes / "checkpoint-2"))
    models_held = [trainer.model, *trainer.teacher_models.values()]
    resident = [stored_bytes(model) for model in models_held]
    trainer.evaluate()
    if trains:
        trainer.save_model()
    return {
        "log": trainer.state.log_history,
        "sources": seen.sources,
        "filled": filled,
        "completions": [completions_of(window) for window in seen.windows],
        "bytes": resident,
        "parts": [parts(model) for model in models_held],
        "logits": logits(trainer.model.eval()),
        "runs under": runs_under(trainer.accelerator),
    }


@contextmanager
def running_nowhere(student: str) -> Iterator[None]:
    """Within it that student does not, as with flash attention where it is not on a GPU yet."""

    def fail(*_, **__):
        raise RuntimeError("not here")

    decoder = {"opt": OPTDecoder, "gpt2": GPT2Model}[student]
    forward, decoder.forward = decoder.forward, fail
    try:
        yield
    finally:
        decoder.forward = forward


def fillings(trainer: AMiDTrainer) -> list[float]:
    """Grows by the epoch whenever a filling teacher asks the one behind it."""
    asked: list[float] = []
    if isinstance(trainer.teacher, FillingTeacher):
        behind = trainer.teacher._teacher

        class Noted:
            """The one behind, with a note of the epoch."""

            def __getattr__(self, name):
                return getattr(behind, name)

            def __call__(self, batch):
                asked.append(trainer.state.epoch or 0.0)
                return behind(batch)

        trainer.teacher._teacher = Noted()
    return asked


def build(
    models: Path,
    output_dir: Path,
    *,
    student: str = "student",
    teacher: str | None = "teacher",
    lora: dict | None = None,
    rows: int | list[int] = 12,
    silent: list[int] | None = None,
    asks: bool = False,
    hints: bool = False,
    **settings,
) -> AMiDTrainer:
    """A trainer for so many `rows`, or these of them; none of the `silent` ones is trained.

    Of `teachers` by name the first has every other row, and so all of the first process. It `asks` in evaluations:
    prompts alone, which the student answers. With `hints` the teacher reads more than the student. `lora` puts a new
    adapter on the student.
    """
    for name in ("teacher_adapter_path", "pretrain_dataset"):
        if name in settings:
            settings[name] = str(models / settings[name])
    if "teacher_model_server_url" in settings:  # the name of a file, because every run of the tests has another port
        settings["teacher_model_server_url"] = (models / settings["teacher_model_server_url"]).read_text()
    train_dataset = messages_dataset(rows) if isinstance(rows, int) else messages_dataset(len(QUESTIONS)).select(rows)
    eval_dataset = chat_prompt_only_dataset(5) if asks else multi_turn_dataset(5)
    if "teachers" in settings:
        teacher, names = None, [*settings["teachers"]]
        settings["teachers"] = {
            name: given
            | {field: str(models / given[field]) for field in IN_MODELS if field in given}
            | {field: str(output_dir / given[field]) for field in IN_CASE if field in given}
            for name, given in settings["teachers"].items()
        }
        train_dataset, eval_dataset = (
            dataset.add_column("teacher", [names[row % len(names)] for row in range(len(dataset))])
            for dataset in (train_dataset, eval_dataset)
        )
    if hints:
        asked = [messages[:1] for messages in train_dataset["messages"]]
        hinted = [[{**turn, "content": f"It is short. {turn['content']}"}] for [turn] in asked]
        train_dataset = train_dataset.add_column("teacher_prompt", hinted)
    if silent is not None:
        train_dataset = train_dataset.add_column("trained", [row not in silent for row in range(rows)])
    return AMiDTrainer(
        str(models / student),
        None if teacher is None else str(models / teacher),
        AMiDConfig(
            **{
                "output_dir": str(output_dir),
                "use_cpu": True,
                "bf16": False,
                "lmbda": 0.0,
                "top_k": 1,
                "num_train_epochs": 1,
                "train_sampling_strategy": "sequential",
                # Weights that follow the gradient's size, which Adam would hide, and no clipping.
                "optim": "sgd",
                "learning_rate": 0.05,
                "max_grad_norm": 100.0,
                "logging_steps": 1,
                "report_to": [],
                "save_strategy": "no",
                "disable_tqdm": True,
                "max_new_tokens": 6,
                **settings,
            }
        ),
        data_collator=None if silent is None else collate,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=None if lora is None else LoraConfig(**LORA, **lora),
    )


def collate(rows: list[dict]) -> dict[str, Tensor]:
    """A collator of one's own: all of a row is trained, or nothing."""
    tokenizer = tiny_tokenizer()
    prepared = []
    for row in rows:
        ids = tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"]
        labels = ids if row.get("trained", True) else [-100] * len(ids)
        prepared.append({"input_ids": ids, "labels": labels, "prompt_ids": ids[:1]})
    return DistillationCollator(tokenizer.pad_token_id)(prepared)


def stored_bytes(model: nn.Module) -> int:
    """What this process holds of the weights between uses: the memory behind them, however it is cut."""
    weights = list(model.parameters())
    weights = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]  # FSDP2's part
    weights += [weight.ds_tensor for weight in weights if hasattr(weight, "ds_tensor")]  # ZeRO-3's
    storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in weights}
    return sum(storage.nbytes() for storage in storages.values())


def parts(model: nn.Module) -> list[str]:
    """The classes of the modules that FSDP2 gathers by themselves."""
    return [type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule)]


def logits(model: nn.Module) -> list:
    """What a student makes of a text."""
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        ids = torch.tensor([tokenizer(CORPUS[0])["input_ids"]])
        return model(input_ids=ids).logits[0, :, : len(tokenizer)].tolist()


def shard_on_cpus() -> None:
    """Have accelerate's state say on CPUs, too, that FSDP was asked for; by itself it falls back to data parallelism.

    What then runs is accelerate's, transformers' and torch's own.
    """
    os.environ["ACCELERATE_USE_FSDP"] = "true"  # as accelerate's launcher does
    init = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = with_fsdp


def without_shared_memory() -> None:
    """Have DeepSpeed's processes talk over gloo, like those of the other engines.

    What it has for CPUs is compiled when it is first used, and whoever is killed then leaves a lock on which all later
    runs wait for ever.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main(models: Path, output_dir: Path, engine: str, cases: dict[str, dict]) -> None:
    rank, written = int(os.environ["RANK"]), []
    if engine == "fsdp2":
        shard_on_cpus()
        written = watch_writing(stored_bytes)
    if "zero" in engine:
        without_shared_memory()
    gc.freeze()  # as in conftest.py
    for name, settings in cases.items():
        split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        written.clear()
        try:
            result = run(models, output_dir / name, **{**ENGINES[engine], **split, **settings})
        except ValueError as error:
            result = {"refused": str(error)}
            (output_dir / name).mkdir(parents=True, exist_ok=True)
        (output_dir / name / f"rank{rank}.json").write_text(json.dumps({**result, "written": written}))
        gc.freeze()  # engines stay, and every later run would walk through them
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
