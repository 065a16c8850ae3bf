"""A federated averaging of arrays that nobody trains, in flwr; runs in an environment of its own.

The client answers with the arrays that it got. The server writes down when each round began and
when its mean was there. Stock FedAvg, no evaluation.
"""

# mypy: ignore-errors
# flwr is no dependency: the checker does not find it.

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def train(message: Message, _context: Context) -> Message:
    """Answer with what came."""
    content = RecordDict(
        {
            "arrays": message.content["arrays"],
            "metrics": MetricRecord({"num-examples": 1}),
        }
    )
    return Message(content=content, reply_to=message)


class Timed(FedAvg):
    """FedAvg that writes down when rounds begin and end."""

    def __init__(self, nodes: int, times: Path) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
        self._times = times

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See ``FedAvg``."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._write("began", server_round, len(messages))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """See ``FedAvg``."""
        replies = list(replies)
        mean = super().aggregate_train(server_round, replies)
        answered = sum(not reply.has_error() for reply in replies)
        self._write("ended", server_round, answered)
        return mean

    def _write(self, what: str, number: int, nodes: int) -> None:
        line = {"what": what, "round": number, "nodes": nodes, "at": time.time()}
        with self._times.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@server_app.main()
def main(grid: Grid, _context: Context) -> None:
    """As many rounds as the variable FLWR_PEER says."""
    config = json.loads(os.environ["FLWR_PEER"])
    tensors = config["tensors"]
    values = config["payload_bytes"] // 4 // tensors
    arrays = ArrayRecord([np.full(values, 1e-3, np.float32) for _ in range(tensors)])
    strategy = Timed(config["nodes"], Path(config["times"]))
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=config["rounds"])


if __name__ == "__main__":
    from flwr.simulation import run_simulation

    run_simulation(server_app, client_app, json.loads(os.environ["FLWR_PEER"])["nodes"])
