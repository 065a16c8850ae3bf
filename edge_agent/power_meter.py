"""How much energy a piece of work draws, where the board measures its power."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

INTERVAL_S = 2.0
"""Between two looks; tegrastats itself needs a fifth of a second."""


async def energy_of(
    work: Callable[[], Awaitable[object]],
    read_watts: Callable[[], float | None],
    *,
    clock: Callable[[], float],
    interval_s: float = INTERVAL_S,
) -> float | None:
    """Do some work and integrate the board's power over it.

    Args:
        work: what to do; its errors come out as they are.
        read_watts: looks at the sensor, in a thread; None at the first look ends the measurement.
        clock: monotonic seconds.
        interval_s: between two looks.

    Returns:
        Joules of the whole board, idle power included; None where it has no power sensor.
    """
    joules: float | None = None
    ended = anyio.Event()

    async def integrate() -> None:
        nonlocal joules
        watts, looked_at = await anyio.to_thread.run_sync(read_watts), clock()
        while watts is not None:
            with anyio.move_on_after(interval_s):
                await ended.wait()
            now = clock()
            joules, looked_at = (joules or 0.0) + watts * (now - looked_at), now
            if ended.is_set():
                return
            watts = await anyio.to_thread.run_sync(read_watts) or watts

    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(integrate, name="power")
        try:
            await work()
        except Exception as error:  # noqa: BLE001  # raised outside of the group, see below
            failure = error
        ended.set()
    if failure is not None:  # raised in the group it would leave it wrapped
        raise failure
    return joules
