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
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, padding_free: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`backbone_states`, and the logits of each layer's router in the same pass, with an entry for each token."""
    backbone: Any = backbone_of(model)
    if padding_free:
        packed = packed_for(model, input_ids, attention_mask)
        outputs = backbone(**packed_inputs(packed), output_router_logits=True)
        return packed.unpacked(outputs.last_hidden_state), tuple(map(packed.unpacked, outputs.router_logits))
    outputs = backbone(**forward_inputs(backbone, input_ids, attention_mask), output_router_logits=True)
    return outputs.last_hidden_state, outputs.router_logits
