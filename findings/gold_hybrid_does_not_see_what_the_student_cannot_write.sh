#!/usr/bin/env bash
# TRL 1.16.0, GOLDTrainer's hybrid loss (`uld_use_hybrid_loss`): where every token of the student is one of the teacher's too, as
# where the student's vocabulary was cut down from the teacher's, the loss has no part for the teacher's own tokens. That part is
# computed only where both sides have tokens without a partner. So a teacher that gives 98 % to a token which the student cannot
# write is off by nothing there; a student with one token more, which it never writes, is off by 0.98.
# Seen with the versions below: the part without partners 0.0000 and 0.9800, of losses of 0.2282 and 0.4732.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/look.py" << 'PYTHON'
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.experimental.gold import GOLDConfig
from trl.experimental.gold.gold_trainer import ULDLoss

SHARED, TEACHERS_OWN, STUDENTS_OWN = ["<eos>", "one", "two"], ["three"], ["four"]
SURE = 0.98  # the teacher's probability of its own token


def tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>")


def losses(student_words: list[str]) -> tuple[float, float]:
    """The loss of the prompt "one" with the answer "two", and its part for tokens without a partner."""
    config = GOLDConfig(
        "unused", use_uld_loss=True, uld_use_hybrid_loss=True, uld_crossentropy_weight=0.0, use_cpu=True, bf16=False
    )
    loss = ULDLoss(config, tokenizer(student_words), tokenizer(SHARED + TEACHERS_OWN))
    ids, labels = torch.tensor([[1, 2, 0]]), torch.tensor([[-100, 2, 0]])
    offsets = torch.tensor([[[0, 0], [0, 3], [3, 3]]])
    student = torch.zeros(1, 3, len(student_words))
    student[..., len(SHARED) :] = -20.0
    rest = (1 - SURE) / len(SHARED)
    teacher = torch.tensor([rest] * len(SHARED) + [SURE]).log().expand(1, 3, -1)
    whole = loss(student, teacher, labels, labels, ids, ids, offsets, offsets)
    return float(whole), float(loss.last_unmatched_loss)


subset, with_own = losses(SHARED), losses(SHARED + STUDENTS_OWN)
print(f"every token of the student is the teacher's: loss {subset[0]:.4f}, without partners {subset[1]:.4f}")
print(f"and one that is not:                         loss {with_own[0]:.4f}, without partners {with_own[1]:.4f}")
assert subset[1] == 0.0 and abs(with_own[1] - SURE) < 1e-3 and with_own[0] > 1.5 * subset[0] > 0
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 trl==1.16.0
"$folder/venv/bin/python" "$folder/look.py" 2> /dev/null
