"""Scenarios with a real Label Studio: a bad network, and a server that forgets, changes or is down."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from fault_proxy import ALWAYS, Fault, FaultProxy
from harness import change_params

from al_pipeline.records import round_name
from al_pipeline.workspace.workspace import open_workspace
from chaos.lab import FaultCount, Lab, Scenario, StudioPeople, project_of
from chaos.sites import Ended, Site, expect, stopped_before

MOST_REQUESTS = 16
"""The maximum number of requests that one tick may send to a server without a usable reply."""

UNUSABLE: dict[Fault, tuple[str, ...]] = {
    "drop_before": ("no usable reply", "is it running"),
    "drop_after": ("no usable reply", "is it running"),
    "500_before": ("status 500", "its own log says why", "try again later"),
    "500_after": ("status 500", "try again later"),
    "502_after": ("status 502", "try again later"),
    "429_before": ("status 429", "asks us to wait", "try again later"),
    "truncate": ("no usable reply",),
    "html_200": ("not as Label Studio does", "log-in page"),
    "wrong_json": ("sent an unexpected reply",),
    "slow": ("gave no reply in time", "label_studio.timeout_seconds"),
}
"""Each fault, and what the message must contain."""

SHORT_SECONDS = 3
"""The time limit if replies are slow."""

DONE_ALL_THE_SAME = ("drop_after", "500_after", "502_after", "truncate", "html_200", "wrong_json", "slow")


def network_scenarios() -> Iterator[Scenario]:
    """All of them."""
    for fault, words in UNUSABLE.items():
        yield Scenario(
            f"network {fault}",
            f"Label Studio: {_SHOWN[fault]}",
            partial(_bad_network, fault=fault, words=words),
            real=True,
        )
    for name, kind, play in (
        ("down", "Label Studio: down for a while", _down),
        ("token revoked", "Label Studio: token revoked", _token_revoked),
        ("project deleted", "Label Studio: project deleted", _project_deleted),
        ("database restored", "Label Studio: database of last week", _database_restored),
        ("database restored, accepted", "Label Studio: database of last week", _database_accepted),
        ("another server", "Label Studio: another server at its address", _another_server),
        ("answers vanish", "Label Studio: many answers deleted", _answers_vanish),
    ):
        yield Scenario(name, kind, play, real=True)
    yield Scenario(
        "Label Studio killed", "kill -9 of Label Studio's server", _server_killed, kills=True, real=True, strikes=5
    )


_SHOWN: dict[Fault, str] = {
    "drop_before": "request lost",
    "drop_after": "reply lost after commit",
    "500_before": "500",
    "500_after": "500 after commit",
    "502_after": "502 after commit",
    "429_before": "429 with Retry-After",
    "truncate": "body truncated",
    "html_200": "HTML in place of JSON",
    "wrong_json": "JSON of another form",
    "slow": "slow beyond the time limit",
}


def _bad_network(lab: Lab, tally: FaultCount, fault: Fault, words: tuple[str, ...]) -> None:
    """Permanent at first contact, once at the project's creation, temporary in push and pull, permanent in the pull."""
    few = 1 if fault == "slow" else 3
    with FaultProxy(lab.studio.url) as proxy, lab.studio_site(proxy.url) as site:
        if fault == "slow":
            change_params(open_workspace(site.root), {"timeout_seconds: 60": f"timeout_seconds: {SHORT_SECONDS}"})
            site.git.run("commit", "--quiet", "--all", "--message", "Wait less")
        with _lasting(site, proxy, tally, fault, "", ""):
            site.refused(5, *words)
        expect(not lab.studio.projects(), "something reached the server")

        proxy.strike(fault, 1, "POST", "/api/projects")
        tally.strike()
        site.refused(5)
        expect(len(lab.studio.projects()) == (fault in DONE_ALL_THE_SAME), "the project is there twice, or not at all")

        proxy.strike(fault, few, "POST", "/import")
        tally.strike()
        struck = proxy.struck
        expect(tally.recovered(site).ticks == 1, "a fault that passes was not waited for")
        expect(proxy.struck > struck, "the push met no fault")
        site.check()
        site.answer()

        with _lasting(site, proxy, tally, fault, "GET", "/api/tasks"):
            site.refused(5, *words)
        proxy.strike(fault, min(few, 2), "GET", "/api/tasks")
        tally.strike()
        expect(tally.recovered(site).ticks == 1, "a fault that passes was not waited for")
        site.check()


@contextmanager
def _lasting(site: Site, proxy: FaultProxy, tally: FaultCount, fault: Fault, method: str, path: str) -> Iterator[None]:
    """The fault hits every such request in the block; there are few requests, and nothing local changes."""
    before, seen = local(site), len(proxy.seen)
    proxy.strike(fault, ALWAYS, method, path)
    tally.strike()
    yield
    proxy.rest()
    sent = len(proxy.seen) - seen
    expect(0 < sent <= MOST_REQUESTS, f"{sent} requests were sent to a server that does not answer")
    expect(local(site) == before, "a tick that failed changed something")


def local(site: Site) -> tuple[Any, ...]:
    """All that a failing tick must leave unchanged locally."""
    return site.git.head(), site.git.tags(), site.git.run("status", "--porcelain").stdout, site.remembered()


def _down(lab: Lab, tally: FaultCount) -> None:
    """Down at the first contact, from the middle of a tick, and before the pull."""
    with FaultProxy(lab.studio.url) as proxy, lab.studio_site(proxy.url) as site:
        before = local(site)
        proxy.go_down()
        tally.strike()
        site.refused(5, "is it running")
        expect(local(site) == before, "a tick that failed changed something")
        proxy.come_back()
        with stopped_before(site, "push") as tick:
            proxy.go_down()
            tally.strike()
            tick.go_on()
            ended = tick.end()
        expect(ended.code == 5 and "is it running" in ended.message, f"expected exit code 5, got {ended.short}")
        proxy.come_back()
        tally.recovered(site)
        site.check()
        site.answer()
        proxy.go_down()
        tally.strike()
        before = local(site)
        site.refused(5, "is it running")
        expect(local(site) == before, "a tick that failed changed something")
        proxy.come_back()
        tally.recovered(site)
        site.check()


def _server_killed(lab: Lab, tally: FaultCount) -> None:
    """Before the push; within it and before the pull, restarted soon; while a stage runs; with new answers."""
    server, draw = lab.studio.server, random.Random("Label Studio killed")

    def kill() -> None:
        server.kill()
        tally.strike()

    with lab.studio_site() as site:
        with stopped_before(site, "push") as tick:
            kill()
            tick.go_on()
            _is_missed(tick.end())
        server.restart()
        with stopped_before(site, "push") as tick:
            tick.go_on()
            time.sleep(draw.uniform(0.05, 0.5))
            kill()
            server.restart()
            ended = tick.end()
        expect(ended.code in (0, 5), f"expected exit code 0 or 5, got {ended.short}")
        tally.recovered(site)
        site.check()
        site.answer()
        with stopped_before(site, "pull") as tick:
            kill()
            server.restart()
            tick.go_on()
            site.await_(lambda: site.stage_process("train"), tick)
            kill()
            _is_missed(tick.end())
        expect(round_name(0) in site.git.tags(), "a round was not published because Label Studio had gone")
        server.restart()
        tally.recovered(site)
        site.check()
        site.answer()
        before = local(site)
        kill()
        _is_missed(site.round())
        expect(local(site) == before, "a tick that failed changed something")
        server.restart()
        tally.recovered(site)
        site.check()


def _is_missed(ended: Ended) -> None:
    expect(ended.code == 5 and "is it running" in ended.message, f"expected exit code 5, got {ended.short}")


def _token_revoked(lab: Lab, tally: FaultCount) -> None:
    """Between two ticks, and in the middle of one."""
    words = ("refused the token (401)", "Copy a new one from Account & Settings")
    studio = lab.studio
    with lab.studio_site() as site:
        site.recover()
        site.answer()
        old = studio.token
        studio.new_token()
        before = local(site)
        tally.strike()
        site.refused(5, *words, AL_LABEL_STUDIO_TOKEN=old)
        expect(local(site) == before, "a tick that failed changed something")
        with stopped_before(site, "pull") as tick:
            studio.new_token()
            tally.strike()
            tick.go_on()
            ended = tick.end()
        expect(ended.code == 5 and words[0] in ended.message, f"expected exit code 5, got {ended.short}")
        expect(old not in ended.err, "a token was printed")
        tally.recovered(site)
        site.check()


def _project_deleted(lab: Lab, tally: FaultCount) -> None:
    """With answers that we pulled: they are kept, and what is still open is asked again in a new project."""
    with lab.studio_site() as site:
        site.recover()
        site.people.answer(site.truth, most=9)
        site.recover()
        before, gone = local(site), {key for key, _ in site.people.given}
        lab.studio.empty()
        tally.strike()
        site.refused(6, "has no project", "nothing was changed", "al adopt --new-project")
        expect(local(site) == before, "a tick that failed changed something")
        site.al("adopt", "--new-project")
        tally.recovered(site)
        site.answer()
        site.recover()
        site.check(gone)


def _database_restored(lab: Lab, tally: FaultCount) -> None:
    """Restored by mistake, then the right one again: nobody's answer is voided in between."""
    studio = lab.studio
    with lab.studio_site() as site:
        site.recover()
        studio.save("week")
        site.people.answer(site.truth, most=12)
        site.recover()
        studio.save("now")
        before = site.remembered()
        studio.restore("week")
        tally.strike()
        for _ in range(2):
            ended = site.round()
            expect(ended.code in (0, 6), f"expected a wait or a question, got {ended.short}")
            expect(site.remembered() == before, "answers were voided because an old database says so")
        studio.restore("now")
        site.answer()
        tally.recovered(site)
        site.check()


def _database_accepted(lab: Lab, tally: FaultCount) -> None:
    """The newer one is lost: the tick asks a person, who has the lost answers given again."""
    studio = lab.studio
    with lab.studio_site() as site:
        site.recover()
        studio.save("week")
        site.people.answer(site.truth, most=12)
        site.recover()
        studio.restore("week")
        tally.strike()
        site.people.given.clear()
        assert isinstance(site.people, StudioPeople)
        site.people.backwards = True  # otherwise each new answer would get the id of a lost one
        site.answer()
        before = site.remembered()
        site.refused(6, "known answers have disappeared", "nothing was recorded", "al round --accept-vanished")
        after = site.remembered()
        expect(after[0] == before[0] and set(after[1]) >= set(before[1]), "what was known is gone")
        expect("delete" not in {event.type for event in site.events()}, "an answer was voided without a word")
        ended = site.round("--accept-vanished")
        expect(ended.code == 0 and ended.told["published"] == [0], f"it was not accepted: {ended.short}")
        tally.recovered(site)
        site.check_results()


def _another_server(lab: Lab, tally: FaultCount) -> None:
    """A server that knows our token, where another project has our project's id; then a server without that id."""
    studio = lab.studio
    with lab.studio_site() as site:
        site.recover()
        site.people.answer(site.truth, most=9)
        site.recover()
        studio.save("ours")
        number = project_of(site).project_id
        before = local(site)
        studio.restore("empty")
        tally.strike()
        site.refused(6, f"no project {number}", "nothing was changed")
        while (made := int(studio.api("POST", "/api/projects/", title="another's")["id"])) < number:
            pass
        expect(made == number, f"the other server's projects begin at {made}, ours is {number}")
        tally.strike()
        site.refused(6, "belongs to", "is that the address of the right server?")
        expect(local(site) == before, "a tick that failed changed something")
        expect(not studio.tasks(), "tasks were sent to another's project")
        studio.restore("ours")
        site.answer()
        tally.recovered(site)
        site.check()


def _answers_vanish(lab: Lab, tally: FaultCount) -> None:
    """Somebody deletes many answers by mistake; they are given again."""
    studio = lab.studio
    with lab.studio_site() as site:
        site.recover()
        site.people.answer(site.truth, most=9)
        site.recover()
        before = local(site)
        for task in studio.tasks():
            for annotation in studio.api("GET", f"/api/tasks/{task['id']}/annotations/"):
                studio.api("DELETE", f"/api/annotations/{annotation['id']}/")
        tally.strike()
        site.refused(6, "known answers have disappeared", "al round --accept-vanished")
        expect(local(site) == before, "something was recorded all the same")
        ended = site.round("--accept-vanished")
        expect(ended.code == 0 and set(ended.told["pulled"]) == {"delete"}, f"it was not accepted: {ended.short}")
        site.people.given.clear()
        site.answer()
        tally.recovered(site)
        site.check_results()
