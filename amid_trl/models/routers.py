"""What the routers of a mixture of experts say of each token."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from amid_trl.models.heads import backbone_of, forward_inputs, packed_inputs
from amid_trl.models.packing import packed_for


def experts_per_token(model: PreTrainedModel) -> int:
    """How many experts each token is routed to; a ValueError if the model is no mixture that tells its routing."""
    count = getattr(model, "num_experts_per_tok", None)
    if not isinstance(count, int) or backbone_of(model) is None:
        raise ValueError(
            f"router_aux_loss_coef is set, but transformers' {type(model).__name__} computes no load-balancing loss; "
            "leave it out"
        )
    return count


def routed_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, places: Tensor, padding_free: bool = False
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """`states_at`, the logits of each layer's router in the same pass, and the 0/1 mask of their tokens."""
    backbone: Any = backbone_of(model)
    if padding_free:
        packed = packed_for(model, input_ids, attention_mask)
        outputs = backbone(**packed_inputs(packed), output_router_logits=True)
        return packed.at(places, outputs.last_hidden_state), outputs.router_logits, packed.of_rows
    outputs = backbone(**forward_inputs(backbone, input_ids, attention_mask), output_router_logits=True)
    hidden = outputs.last_hidden_state
    return hidden[places.to(hidden.device)], outputs.router_logits, attention_mask
