"""The papers: which device trains which layers, and how updates become one adapter.

Knows numbers only: capacities in, LoRA configs out; deltas in, an adapter out.
No I/O, no clock, no torch: the live server and the simulation run this code.

One symbol, one name. "Section" is where LEGEND (arXiv:2412.20004, IEEE TMC
24(11)) treats the quantity; the last column says how sure that is: "paper" is
stated there, "reconstructed" fills in what could not be read, "ours" is decided here.

    symbol    our name                      unit          section                  origin
    i, n      device_id, devices            -             problem formulation      paper
    h         round_number, from 1          -             problem formulation      paper
    L         layer_count                   layers        LoRA configuration       paper
    k_i       LoraConfig.depth              layers        LoRA configuration       paper
    r_l       LoraConfig.ranks[l]           -             LoRA configuration       paper
    r_0       rank_min                      -             LoRA configuration       reconstructed
    lambda    rank_step                     ranks/layer   LoRA configuration       reconstructed
    sum r_l   rank_budget                   -             problem formulation      reconstructed
    k_min     depth_min                     layers        greedy LCD algorithm     reconstructed
    T_ref     pace (configure.greedy_pace)  s             greedy LCD algorithm     reconstructed
    F_i       forward_s_per_token_layer     s             capacity estimation      ours: per token
    mu_i      backward_s_per_token_layer    s             capacity estimation      ours: per token
    beta_i    1 / up_bytes_per_s            s/byte        capacity estimation      ours: per byte
    rho       rho                           -             capacity estimation      reconstructed
    t_i       completion_s, predicted_s     s             problem formulation (1)  reconstructed
    W         mean_waiting_s                s             problem formulation (2)  reconstructed
    W_max     waiting_max_s, .._share       s, -          problem formulation (4)  reconstructed
    M_i       memory_budget_bytes           bytes         problem formulation (4)  ours: byte model
    p_i       weight                        examples      adaptive aggregation     reconstructed
    -         row-wise holders              -             adaptive aggregation     ours
    tau       steps                         local steps   local fine-tuning        paper
    -         server_learning_rate          -             adaptive aggregation     ours
    D         deadline.deadline_s           s             -                        ours
    U         deadline utility              ranks/s, /J, /byte  -                  ours
    g_l       importance: the rank r_l      ranks         -                        ours

Equations (1) to (6) are written out in ``docs/legend.md``.
"""

from broker_server.strategies.capacity import (
    CapacityEstimate,
    Observation,
    RoundTimes,
    device_capacity,
    observe,
)
from broker_server.strategies.learning import (
    RoundOutcome,
    learn_from_round,
    restore_state,
    saved_state,
)
from broker_server.strategies.named import STRATEGY_NAMES, strategy_named
from broker_server.strategies.strategy import (
    Adapter,
    Aggregation,
    Configuration,
    DeviceCapacity,
    Factors,
    Plan,
    RunShape,
    Strategy,
)

__all__ = [
    "STRATEGY_NAMES",
    "Adapter",
    "Aggregation",
    "CapacityEstimate",
    "Configuration",
    "DeviceCapacity",
    "Factors",
    "Observation",
    "Plan",
    "RoundOutcome",
    "RoundTimes",
    "RunShape",
    "Strategy",
    "device_capacity",
    "learn_from_round",
    "observe",
    "restore_state",
    "saved_state",
    "strategy_named",
]
