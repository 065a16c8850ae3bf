"""Every way an assignment can end becomes an event; none ends the agent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from edge_agent import session
from wire_protocol.errors import DeviceError, FailureCode, LegendError
from wire_protocol.messages import UpdateManifest

log = structlog.get_logger()


async def outcome_of(
    assignment_id: str, work: Callable[[], Awaitable[UpdateManifest]]
) -> session.Event:
    """Wait for the work and name what became of it."""
    try:
        return session.WorkFinished(await work())
    except DeviceError as error:
        return session.WorkFailed(assignment_id, error.code, str(error))
    except LegendError as error:
        return session.WorkFailed(assignment_id, FailureCode.DOWNLOAD_FAILED, str(error))
    except Exception as error:
        log.exception("assignment_crashed", assignment_id=assignment_id)
        line = f"{type(error).__name__}: {error}"
        return session.WorkFailed(assignment_id, FailureCode.INTERNAL, line)
