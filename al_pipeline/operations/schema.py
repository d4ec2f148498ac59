"""Check the classes in `params.yaml` against the published ones, before anything is changed."""

from __future__ import annotations

from al_pipeline.annotation.active_events import schemas_of
from al_pipeline.annotation.schema_change import Published, missing_in_use, taken_away, wrong_version
from al_pipeline.annotation.votes import labels_in_use
from al_pipeline.data.ledger import read_events
from al_pipeline.errors import AlError, BadParams, SchemaInUse
from al_pipeline.operations.close import carry_out
from al_pipeline.operations.counting import counted_events
from al_pipeline.operations.history import History
from al_pipeline.records import round_name
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace


def check_schema(workspace: Workspace, history: History) -> None:
    """Raise BadParams if the classes changed without a new version, SchemaInUse if one that is in use is missing."""
    if problem := schema_problem(workspace, history):
        raise problem


def schema_problem(workspace: Workspace, history: History) -> AlError | None:
    """The error that `check_schema` would raise; None if the classes are valid."""
    if any(intervention.params_from is not None for intervention in history.waiting):
        return None  # the next close restores a snapshot's params.yaml, which was checked together with it
    layout, schema = workspace.layout, workspace.params.schema_
    published = published_schema(history)
    if published is not None and (published.version, published.labels) == (schema.version, tuple(schema.labels)):
        return None
    events = read_events(layout.events, layout.inbox_events)
    events += carry_out(history.waiting, layout.events)  # a waiting revocation may free a class
    if (schemas := schemas_of(events)) is not None and (problem := taken_away(schema.labels, schemas.former())):
        return BadParams(problem)
    used = labels_in_use(events)
    in_words = {
        name: ", ".join(f"{count:,} of the {part}{' set' if part == 'test' else ''}" for part, count in parts.items())
        for name, parts in sorted(used.items())
    }
    if problem := missing_in_use(schema.labels, in_words):
        return SchemaInUse(problem)
    if published is not None and (problem := wrong_version(published, schema)):
        return BadParams(problem)
    return None


def schema_news(workspace: Workspace, history: History) -> str | None:
    """Explain what classes that no published round has mean for the existing labels; None if there are none.

    Not of a change of classes, which was shown when it was made.
    """
    published, latest = published_schema(history), history.latest
    if published is None or latest is None or any(one.changes_classes for one in history.waiting):
        return None
    added = [name for name in workspace.params.schema_.labels if name not in published.labels]
    labels, test = latest.counts.labelled, latest.counts.test_labelled
    if not added or not labels + test:
        return None
    named = f"{', '.join(map(repr, added))} {'is' if len(added) == 1 else 'are'} new"
    return (
        f"{named} since {published.where}: {labels:,} labels and {test:,} of the test set were given without it, and "
        "stay as they are. If some of them should have the new class, `al labels revoke --item ITEM` has an item "
        "asked again"
    )


def published_schema(history: History) -> Published | None:
    """The schema of the newest record; None before the first build."""
    record = history.latest
    if record is None:
        return None
    schema = record.params.schema_
    where = "the first build" if record.round is None else round_name(record.round)
    return Published(schema.version, schema.labels, where)


def former_classes(layout: Layout) -> frozenset[str]:
    """Classes that changes of the schema took away; answers and imported labels may still name them."""
    schemas = counted_events(layout.events, layout.inbox_events).schemas
    return frozenset() if schemas is None else schemas.former()


def published_labels(history: History) -> frozenset[str]:
    """All classes of any record's schema. Any other class that Label Studio offers was added there by hand.

    Without those that a change of classes brought with the newest round: Label Studio may not have them yet.
    """
    records = [*([history.genesis] if history.genesis else []), *history.rounds]
    classes = [frozenset(record.params.schema_.labels) for record in records]
    brought: frozenset[str] = frozenset()
    if len(records) > 1 and any(one.changes_classes for one in records[-1].interventions):
        brought = classes[-1] - classes[-2]
    return frozenset().union(*classes) - brought
