"""Let one `dvc repro` of many stages begin each of them only when it is asked for.

A command spends more on reading the repository than on a stage, and the caller checks what each stage wrote before the
next one begins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

NEXT = "next"
"""The key of the request for one of the stages that a command was given: `{"next": "train"}`."""


class Requests:
    """The requests on `lines`, as an iterator. One of them can be put back."""

    def __init__(self, lines: TextIO) -> None:
        self._lines = lines
        self._put_back: list[Any] = []
        self.all_replied = False
        """Whether the command that runs has ended, with all that it was asked for replied: another request came."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.all_replied = False
        return self._put_back.pop() if self._put_back else json.loads(next(self._lines))

    def put_back(self, request: Any) -> None:
        self._put_back.append(request)


def pace_stages(requests: Requests, reply: Callable[[int], None]) -> None:
    """Make `dvc repro` begin the first stage that it is given, and each other one at a request for it.

    It passes over stages before the one asked for, and ends at any other request. Between two stages it sends the reply
    for the first, and does not hold the repository's lock.
    """
    import dvc.repo.reproduce as module
    from dvc.stage.decorators import unlocked_repo

    reproduce_all, reproduce_one = module._reproduce, module._reproduce_stage

    def ask() -> str:
        reply(0)
        request = next(requests, None)
        if not isinstance(request, Mapping) or NEXT not in request:
            if request is not None:
                requests.put_back(request)
            requests.all_replied = True
            raise SystemExit
        return str(request[NEXT])

    def paced(stages: Sequence[Any], *given: Any, **more: Any) -> Any:
        asked = stages[0].addressing if stages else None

        def when_asked(stage: Any, **how: Any) -> Any:
            nonlocal asked
            if asked is None:
                asked = unlocked_repo(lambda _: ask())(stage)
            if stage.addressing != asked:
                return None
            asked = None
            return reproduce_one(stage, **how)

        return reproduce_all(stages, *given, **more, repro_fn=when_asked)

    module._reproduce = paced
