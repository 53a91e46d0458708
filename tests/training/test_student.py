"""What becomes of a student that is not trained as the defaults say."""

import pytest
from families import family_model
from observe import logged


@pytest.mark.parametrize("family", ["ctrl", "openai-gpt", "gpt_neox_japanese", "jetmoe"])
def test_checkpointing_is_off_where_it_cannot_be_done_and_was_not_asked_for(train, tokenizer, caplog, family):
    student = family_model(family, tokenizer)
    settings = {"max_steps": 1, "teacher_model": family_model(family, tokenizer, seed=1)}
    trainer = train(model=student, gradient_checkpointing=..., **settings)
    assert f"gradient_checkpointing is off: transformers' {type(student).__name__} cannot do it" in caplog.text
    trainer.train()
    assert len(logged(trainer, "loss")) == 1
    with pytest.raises(ValueError, match=f"gradient_checkpointing=True is asked for, but.*{type(student).__name__}"):
        train(model=student, gradient_checkpointing=True, **settings)


def test_checkpointing_stays_on_where_it_can_be_done(train, caplog):
    trainer = train(gradient_checkpointing=...)
    assert trainer.args.gradient_checkpointing and "gradient_checkpointing" not in caplog.text
