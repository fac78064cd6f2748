"""The balance of a mixture of experts: a loss that is least where all experts get the same share of the tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def load_balance(logits: Sequence[Tensor], top_k: int) -> tuple[Tensor, Tensor]:
    """E sum_e f_e P_e (Switch Transformer, Fedus et al., arXiv:2101.03961, eq. 4 to 6, without its factor alpha), as
    transformers' load_balancing_loss_func has it: `logits` [T, E] of each layer's router, f_e the times that expert e
    is among a token's `top_k`, P_e its mean probability, both over the tokens of all layers. top_k where all is even.
    Also each expert's choices [E], without a gradient."""
    experts = logits[0].shape[-1]
    wide = torch.promote_types(logits[0].dtype, torch.float32)
    chosen_E, probability_E = (torch.zeros(experts, dtype=wide, device=logits[0].device) for _ in range(2))
    for logits_TE in logits:
        p_TE = logits_TE.to(wide).softmax(-1)
        places = p_TE.detach().topk(top_k, -1).indices.flatten()
        chosen_E = chosen_E.index_add(0, places, torch.ones_like(places, dtype=wide))
        probability_E = probability_E + p_TE.sum(0)
    rows = sum(logits_TE.shape[0] for logits_TE in logits)
    return experts * (chosen_E / rows * probability_E / rows).sum(), chosen_E
