"""The loss of a step: which tokens, which objective, how it is counted."""

import copy

import pytest
import torch
from observe import Windows, dense_loss, logged
from tiny import messages_dataset, multi_turn_dataset, text_dataset, tiny_gpt2, tiny_llama

from amid_trl.maths.linear import linear_token_loss


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_the_loss_is_the_objective_of_the_logits_at_trained_positions(train, tokenizer, build):
    trainer = train(
        model=build(tokenizer), teacher_model=build(tokenizer, seed=1), train_dataset=multi_turn_dataset(4)
    )
    batch = next(iter(trainer.get_train_dataloader()))
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), dense_loss(trainer, batch))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_left_padding_by_a_collator_of_ones_own_changes_nothing(train, tokenizer, build):
    trainer = train(model=build(tokenizer), teacher_model=build(tokenizer, seed=1), per_device_train_batch_size=4)
    batch = next(iter(trainer.get_train_dataloader()))
    left = {
        name: torch.stack(
            [row.roll(int((1 - mask).sum())) for row, mask in zip(batch[name], batch["attention_mask"], strict=False)]
        )
        for name in ("input_ids", "labels", "attention_mask")
    }
    assert not torch.equal(left["input_ids"], batch["input_ids"])
    torch.testing.assert_close(trainer.compute_loss(trainer.model, left), trainer.compute_loss(trainer.model, batch))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # the compiler's own
def test_training_with_the_compiled_kernel_is_training_without(train, tokenizer, monkeypatch, compiling):
    weights, figures = [], []
    for least_vocab in (0, 10**9):
        monkeypatch.setattr("amid_trl.maths.kernel.COMPILE_FROM_VOCAB", least_vocab)
        trainer = train(
            model=tiny_llama(tokenizer), objective="gkd", eval_dataset=messages_dataset(3), sft_weight=0.5, max_steps=3
        )
        trainer.train()
        weights.append(torch.cat([parameter.flatten() for parameter in trainer.model.parameters()]).detach())
        figures.append(trainer.evaluate() | {name: logged(trainer, name)[-1] for name in ("loss", "kl", "nll")})
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    for name in ("eval_loss", "eval_top1_agreement", "loss", "kl", "nll"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-4)


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(train, student):
    trainer = train(teacher_model=copy.deepcopy(student), max_steps=1)
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([0.0], abs=1e-6)
    assert logged(trainer, "grad_norm") == pytest.approx([0.0], abs=1e-5)
    assert logged(trainer, "top1_agreement") == [1.0]


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_the_gkd_objective_is_the_loss_of_gkd_trainer(train, beta):
    theirs = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    trainer = train(objective="gkd", beta=beta)
    batch = next(iter(trainer.get_train_dataloader()))
    student, teacher = (
        model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        for model in (trainer.model, trainer.teacher_model)
    )
    want = theirs.generalized_jsd_loss(student, teacher, batch["labels"][:, 1:], beta=beta)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), want)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 4), (2, 2)])
def test_any_split_of_a_window_gives_the_same_loss_and_gradient(
    train, tokenizer, tmp_path, lmbda, batch_size, accumulation
):
    # Greedy sampling fixes the student's text, whichever rows share a call of `generate`.
    def one_step(batch_size: int, accumulation: int) -> tuple[float, float]:
        trainer = train(
            model=tiny_llama(tokenizer),
            lmbda=lmbda,
            top_k=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            train_dataset=multi_turn_dataset(4) if lmbda == 0 else messages_dataset(4),
        )
        trainer.train()
        return logged(trainer, "loss")[0], logged(trainer, "grad_norm")[0]

    assert one_step(batch_size, accumulation) == pytest.approx(one_step(4, 1), rel=1e-5)


def test_gradient_checkpointing_changes_nothing(train, tokenizer):
    norms = []
    for checkpointing in (False, True):
        trainer = train(model=tiny_llama(tokenizer), gradient_checkpointing=checkpointing, lmbda=1.0, max_steps=1)
        trainer.train()
        norms.append((logged(trainer, "loss")[0], logged(trainer, "grad_norm")[0]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_batch_without_trained_tokens_is_a_zero_with_gradients(train):
    trainer = train()
    batch = next(iter(trainer.get_train_dataloader()))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())


def test_bfloat16_models_stay_close_to_float32(train, tokenizer, student, teacher):
    reference = train()
    batch = next(iter(reference.get_train_dataloader()))
    half = train(model=copy.deepcopy(student).bfloat16(), teacher_model=copy.deepcopy(teacher).bfloat16())
    got, want = (trainer.compute_loss(trainer.model, batch).item() for trainer in (half, reference))
    assert got == pytest.approx(want, rel=0.02)


def test_cross_entropy_joins_on_dataset_and_teacher_text_and_never_on_the_students_own(train, tokenizer):
    for settings, share in (({"lmbda": 0.0}, 0.5), ({"lmbda": 1.0}, 0.0), ({"lmbda": 0.0, "seq_kd": True}, 0.5)):
        trainer = train(model=tiny_llama(tokenizer), **settings, sft_weight=0.5, max_steps=1)
        trainer.train()
        [loss], [objective], [nll] = (logged(trainer, name) for name in ("loss", "objective", "nll"))
        assert loss == pytest.approx(objective + share * nll, rel=1e-5)


def test_under_bf16_autocast_both_models_run_in_bf16_and_the_loss_in_float32(train, monkeypatch, student, teacher):
    seen = []

    def spy(student, teacher, token_loss, *rest):
        def looking(student_logits, teacher_logits, *columns):
            losses, figures = token_loss(student_logits, teacher_logits, *columns)
            seen.append((student_logits.dtype, teacher_logits.dtype, losses.dtype))
            return losses, figures

        return linear_token_loss(student, teacher, looking, *rest)

    monkeypatch.setattr("amid_trl.training.batch_loss.linear_token_loss", spy)
    layers = []
    for model in (student, teacher):
        layer = model.model.layers[0].self_attn.q_proj
        layer.register_forward_hook(lambda module, inputs, output: layers.append(output.dtype))
    losses, gradients = [], []
    for bf16 in (False, True):
        trainer = train(bf16=bf16)
        del layers[2 * len(losses) :]  # of the rows that the models are compared on when they are given
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]))
    assert layers == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    assert seen == [(torch.float32,) * 3, (torch.bfloat16, torch.bfloat16, torch.float32)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def test_the_first_token_of_a_row_is_not_counted(train):
    # Plain text trains every token, but no logit predicts the first one.
    trainer = train(train_dataset=text_dataset(2), max_steps=1)
    seen = Windows(trainer)
    trainer.train()
    [(batches, count)] = seen.windows
    assert int(count) == sum(int((batch["labels"] != -100).sum()) - len(batch["labels"]) for batch in batches)


@pytest.mark.parametrize(("averages", "factor"), [(True, 2), (False, 1)])
def test_a_count_of_all_processes_is_made_up_for_where_gradients_are_averaged(train, monkeypatch, averages, factor):
    trainer = train(average_tokens_across_devices=averages)
    batch = next(iter(trainer.get_train_dataloader()))
    alone = trainer.compute_loss(trainer.model, batch, num_items_in_batch=7)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch, num_items_in_batch=7), factor * alone)
