"""Every way an assignment can end becomes an event; none ends the agent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from edge_agent import session
from edge_agent.state_dir import disk_error
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
    except OSError as error:
        # Not every file is written by a function that names its errors.
        named = disk_error(Path(str(error.filename or "the state directory")), error)
        log.error("assignment_not_written", assignment_id=assignment_id, error=str(named))
        return session.WorkFailed(assignment_id, named.code, str(named))
    except LegendError as error:
        return session.WorkFailed(assignment_id, FailureCode.DOWNLOAD_FAILED, str(error))
    except Exception as error:
        log.exception("assignment_crashed", assignment_id=assignment_id)
        line = f"{type(error).__name__}: {error}"
        return session.WorkFailed(assignment_id, FailureCode.INTERNAL, line)
