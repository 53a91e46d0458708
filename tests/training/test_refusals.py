"""What cannot be trained is refused before training, by name, and what only looks like it is not."""

import pytest
from datasets import Dataset
from observe import Windows, completions_of, logged
from tiny import (
    chat_prompt_only_dataset,
    messages_dataset,
    tiny_gpt2,
    tiny_llama,
)

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl._trl import GKDConfig


def test_a_missing_teacher_is_named(tmp_path, student, tokenizer):
    config = AMiDConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=r"teacher_model \(or args.teacher_model_name_or_path\) is missing"):
        AMiDTrainer(student, args=config, train_dataset=messages_dataset(2), processing_class=tokenizer)


def test_kwargs_for_a_teacher_that_is_loaded_already_are_refused(train):
    with pytest.raises(ValueError, match="teacher_model_init_kwargs is for a teacher given by name"):
        train(teacher_model_init_kwargs={"dtype": "float32"})


def test_positions_bound_the_prompt_budget(train, tokenizer):
    with pytest.raises(ValueError, match=r"max_new_tokens=60 leaves no room.*allow 48 tokens"):
        train(teacher_model=tiny_llama(tokenizer, max_position_embeddings=48), lmbda=1.0, max_new_tokens=60)


def test_a_max_length_without_room_bounds_the_datasets_rows_and_the_prompts(train, tokenizer, caplog):
    rows = [{"prompt": "Is water wet?", "completion": " Yes, " * length} for length in (1, 50)]
    asked = len(tokenizer("Is water wet?")["input_ids"])
    settings = {"train_dataset": Dataset.from_list(rows), "max_length": asked + 4, "max_new_tokens": asked + 4}
    trainer = train(**settings, lmbda=1.0)
    assert [len(row["input_ids"]) for row in trainer.train_dataset] == [asked + 4, asked + 4]
    said = "max_length=%s leaves no room beside max_new_tokens=%s: it bounds the dataset's rows and the prompts alone"
    assert said % (asked + 4, asked + 4) in caplog.text
    windows = Windows(trainer)
    trainer.train()
    [(batches, _), *_] = windows.windows
    lengths = [len(row) for row in completions_of((batches, 0))]
    assert all(1 <= length <= asked + 4 for length in lengths) and max(lengths) > 4  # beyond max_length
    with pytest.raises(ValueError, match=f"prompt longer than {asked - 1} tokens \\(max_length\\)"):
        train(**{**settings, "max_length": asked - 1}, lmbda=1.0)


def test_generated_text_fits_the_models_positions(train, tokenizer):
    student = tiny_gpt2(tokenizer, n_positions=40)  # GPT-2 raises beyond its positions
    trainer = train(
        model=student, teacher_model=tiny_gpt2(tokenizer, seed=1), lmbda=1.0, max_new_tokens=8, max_steps=4
    )
    trainer.train()
    assert len(logged(trainer, "loss")) == 4


def test_a_stream_without_a_usable_row_is_refused(train):
    with pytest.raises(ValueError, match="none of the first 1000 rows of the train dataset can be used"):
        train(train_dataset=chat_prompt_only_dataset(4).to_iterable_dataset(), lmbda=0.0)


def test_tokens_that_the_tokenizer_does_not_have_are_refused(train, tokenizer):
    rows = Dataset.from_list([{"input_ids": [5, len(tokenizer)], "labels": [-100, len(tokenizer)]}])
    with pytest.raises(ValueError, match=f"token {len(tokenizer)}, but the tokenizer has {len(tokenizer)} tokens"):
        train(train_dataset=rows)


def test_unprepared_rows_need_a_collator(train):
    with pytest.raises(ValueError, match="needs a data_collator"):
        train(dataset_kwargs={"skip_prepare_dataset": True})


def test_a_processor_is_refused(tmp_path, student, teacher):
    class Processor:
        pad_token = eos_token = "x"

    config = AMiDConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="processing_class must be a tokenizer; got a Processor"):
        AMiDTrainer(student, teacher, config, train_dataset=messages_dataset(2), processing_class=Processor())


def test_a_multimodal_model_is_refused(train, student):
    student.config.vision_config = {"hidden_size": 8}
    with pytest.raises(ValueError, match=r"the student .* is a multimodal model"):
        train()


def test_a_config_of_another_trainer_is_refused(student, teacher, tokenizer, tmp_path):
    with pytest.raises(TypeError, match="args must be an AMiDConfig; got a GKDConfig"):
        AMiDTrainer(
            student,
            teacher,
            GKDConfig(output_dir=str(tmp_path), use_cpu=True),
            train_dataset=messages_dataset(2),
            processing_class=tokenizer,
        )


def test_a_process_that_sees_several_gpus_is_refused(train, monkeypatch):
    # By SFTTrainer: transformers would wrap the student in nn.DataParallel, whose replicas our loss does not run.
    monkeypatch.setattr(AMiDConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"nn.DataParallel.*accelerate launch.*CUDA_VISIBLE_DEVICES"):
        train()


def test_logits_processing_is_refused(tmp_path, student, teacher, tokenizer):
    with pytest.raises(ValueError, match="logits are never held"):
        AMiDTrainer(
            student,
            teacher,
            AMiDConfig(output_dir=str(tmp_path), use_cpu=True),
            train_dataset=messages_dataset(2),
            processing_class=tokenizer,
            preprocess_logits_for_metrics=lambda logits, labels: logits,
        )


def test_a_run_of_no_step_is_refused_and_its_student_can_be_evaluated(train):
    trainer = train(max_steps=0, eval_dataset=messages_dataset(2))
    assert trainer.evaluate()["eval_kl"] > 0
    with pytest.raises(ValueError, match="max_steps=0 trains nothing"):
        trainer.train()
