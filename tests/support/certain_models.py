"""Two models that are certain of one text, each in its own tokens: whatever they are compared on, they agree."""

from __future__ import annotations

import torch
from torch import Tensor

from amid_trl.maths.linear import Head, States
from amid_trl.maths.outcomes import UNPAIRED, OutcomeTokenLoss
from amid_trl.maths.paired import paired_token_loss
from amid_trl.maths.published import kd
from amid_trl.models.retokenising import Retokeniser
from amid_trl.teacher.other_tokenizer import _asked, _paired


LOGIT = 25.0  # of the token that comes next, where all others have 0


def disagreements(pair: Retokeniser, ids: list[int]) -> dict[int, float]:
    """KL(p‖q) in nats at each token of a row that is compared, by its place."""
    written = pair.write(ids)
    places = pair.places(ids, ids, written)
    asked = _asked(places)
    teacher = States(torch.eye(len(asked)), _certain(len(pair.teacher.bytes), [written.ids[at] for at in asked]))
    student = States(torch.eye(len(ids) - 1), _certain(len(pair.student.bytes), ids[1:]))
    token_loss = OutcomeTokenLoss(kd(), outcomes=pair.pairs.outcomes)
    with torch.no_grad():
        _, figures = paired_token_loss(
            student, _paired(teacher, [places], [asked]), token_loss, torch.tensor(ids[1:]), 64
        )
    kl = figures[:, token_loss.figures.index("kl")].tolist()
    return {i: kl[i - 1] for i, place in enumerate(places, start=1) if place.kind != UNPAIRED}


def _certain(vocabulary: int, tokens: list[int]) -> Head:
    weight: Tensor = torch.zeros(vocabulary, len(tokens))
    weight[torch.tensor(tokens, dtype=torch.long), torch.arange(len(tokens))] = LOGIT
    return Head(weight)
