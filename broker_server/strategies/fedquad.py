"""FedQuad: LEGEND's depth by capacity, and activations in eight bits where memory is short.

A preset of LEGEND's parts, with the same rank at every layer.
"""

from __future__ import annotations

from broker_server.strategies.capacity import DEFAULT_RHO
from broker_server.strategies.legend import Legend
from broker_server.strategies.options import integer, number, optional
from wire_protocol.lora import MAX_RANK

FEDQUAD_OPTIONS = {
    "rank": integer(1, MAX_RANK),
    "depth_min": optional(integer(1)),
    "rho": number(0, 1),
}


def fed_quad(rank: int = 8, depth_min: int | None = None, rho: float = DEFAULT_RHO) -> Legend:
    """FedQuad: the depth that time and memory allow, the fewest quantised layers for it.

    Its search is read from the abstract: depth follows the pace of the slowest device,
    like LEGEND's, and quantisation lifts the cap that memory sets.

    Source: arXiv:2506.01001.
    """
    return Legend(
        rank_min=rank, rank_step=0.0, depth_min=depth_min, rho=rho, quantise_activations=True
    )
