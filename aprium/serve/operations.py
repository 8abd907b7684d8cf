"""What operators ask: is it well, is it ready, how loaded is it; and what they may tell it to do.

The routes of control change the engine for everybody, so they want a key of their own
(`serve/guard`).
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, StrictBool, StrictStr
from starlette.responses import Response

import aprium
from aprium.base.errors import CheckpointError, EngineError, RequestError
from aprium.engine.engine import Engine
from aprium.serve.service import Service, check_running
from aprium.serve.transport import Json

_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class UpdateWeights(BaseModel):
    """The body of /update_weights: a directory on the server; see `Engine.update_weights`."""

    path: StrictStr
    recompute: StrictBool = False


class FinishThinking(BaseModel):
    """The body of /finish_thinking: the `id` of one answer, or none for all."""

    id: StrictStr | None = None


class OperationRoutes:
    """The handlers of one service."""

    def __init__(self, service: Service) -> None:
        self._service, self._engine = service, service.engine

    async def health(self) -> Response:
        """Say whether the engine is well."""
        check_running(self._engine)
        return Json({"status": "ok"})

    async def ready(self) -> Response:
        """Say whether a request would be taken up now."""
        check_running(self._engine)
        if self._service.admission.closing:
            raise EngineError("the server is shutting down")
        if self._engine.paused:
            raise EngineError("the engine is paused: POST /resume")
        return Json({"status": "ready"})

    async def version(self) -> Response:
        """Return the version of this package."""
        return Json({"version": aprium.__version__})

    async def metrics(self) -> Response:
        """Return counters, gauges and histograms in Prometheus' format."""
        return Response(self._service.metrics.text(), headers={"content-type": _TEXT})

    async def load(self) -> Response:
        """Return how much is going on, and the engine's counters, of which a client takes rates.

        `time_s` is of a clock that only goes forward, since an unknown moment.
        """
        admission, failed = self._service.admission, self._engine.failed
        return Json(
            {
                "time_s": time.monotonic(),
                "failed": None if failed is None else str(failed),
                "max_model_len": self._engine.max_model_len,
                "server_load": admission.num_requests,
                "queued_requests": admission.num_queued,
                "queued_tokens": admission.num_queued_tokens,
                "predicted_wait_s": admission.predict_wait_s(),
                "refused": dict(admission.refused),
                "paused": self._engine.paused,
                "closing": admission.closing,
                "engine": dataclasses.asdict(self._engine.stats()),
            }
        )

    async def pause(self) -> Response:
        """Compute no more steps; requests wait where they are."""
        await self._engine.pause()
        return self._paused()

    async def resume(self) -> Response:
        """Go on."""
        await self._engine.pause(False)
        return self._paused()

    async def is_paused(self) -> Response:
        """Say whether steps are computed."""
        return self._paused()

    async def update_weights(self, body: UpdateWeights) -> Response:
        """Replace the weights between two steps."""
        source = Path(body.path)
        if not source.is_dir():
            raise RequestError(
                f"path is {body.path!r}: give a directory of a checkpoint on the server",
                param="path",
            )
        update = functools.partial(Engine.update_weights, source=source, recompute=body.recompute)
        try:
            version = await self._engine.call(update)
        except CheckpointError as error:
            raise RequestError(str(error), param="path") from error
        return Json({"weight_version": version})

    async def reset_prefix_cache(self) -> Response:
        """Forget all kept states, those on disk too."""
        await self._engine.call(Engine.reset_prefix_cache)
        return Json({"reset": True})

    async def finish_thinking(self, body: FinishThinking | None = None) -> Response:
        """End the reasoning of one answer, or of all."""
        ended = await self._engine.finish_thinking(body.id if body is not None else None)
        return Json({"ended": ended})

    def _paused(self) -> Response:
        found: dict[str, Any] = {"is_paused": self._engine.paused}
        return Json(found)
