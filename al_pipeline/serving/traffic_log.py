"""Keeps requests and answers, `serve.log`: what the server records, and what it shows of that."""

from __future__ import annotations

import os
from collections.abc import Mapping

from al_pipeline.operations.plugins import redaction_of
from al_pipeline.params import Params
from al_pipeline.serving.app import Answered
from al_pipeline.serving.log import RequestLog
from al_pipeline.traffic.log import Redact, TrafficLog
from al_pipeline.traffic.rows import LoggedRequest
from al_pipeline.workspace.home import SECRET_VARIABLES
from al_pipeline.workspace.workspace import Workspace


class TrafficRecorder:
    """Records a random share of the answers that a server gives."""

    def __init__(self, traffic: TrafficLog) -> None:
        self._traffic = traffic

    async def __call__(self, answered: Answered) -> None:
        """Record an answer, if it is drawn."""
        if self._traffic.drawn():
            await self._traffic.record(logged(answered, self._traffic.share))

    def counts(self) -> Mapping[str, int]:
        """Texts that were logged, and that were not, each by reason."""
        found = self._traffic.counts()
        return {"logged": found.logged, **found.unlogged}

    def close(self) -> None:
        """Write what waits."""
        self._traffic.close()


def logged(answered: Answered, share: float) -> LoggedRequest:
    """What is written of an answer."""
    model = answered.model
    return LoggedRequest(
        time=int(answered.time * 1e6),
        request_id=answered.request_id,
        round=model.round,
        digest=model.digest,
        runtime=model.runtime,
        propensity=share,
        classes=model.classes,
        texts=tuple(answered.texts),
        places=tuple(range(len(answered.texts))),
        proba=tuple(map(tuple, answered.proba.tolist())),
    )


def open_recorder(workspace: Workspace, log: RequestLog) -> TrafficRecorder | None:
    """What keeps requests as `serve.log` says; None if it keeps none. Problems are told in the server's log.

    Raises BadParams or UnexpectedChange if the redaction is missing or not trusted, UnsafeFolder if others could read
    what is kept.
    """
    settings = workspace.params.serve.log
    if not settings.share:
        return None
    redact = _redaction(workspace.params, workspace)
    return TrafficRecorder(
        TrafficLog(workspace.layout.traffic, settings, redact, lambda missed: log.write("unlogged", texts=dict(missed)))
    )


def _redaction(params: Params, workspace: Workspace) -> Redact | None:
    """The user's redaction, imported; its code finds none of our secrets in the environment."""
    for named in redaction_of(params):
        from al_pipeline.plugins.loading import load
        from al_pipeline.plugins.references import find

        for name in SECRET_VARIABLES:
            os.environ.pop(name, None)
        found: Redact = load(find(named, workspace.layout.root))
        return found
    return None
