"""The path and the owner of every file in a workspace, as data."""

from __future__ import annotations

import re
from pathlib import Path

from msgspec import Struct

from al_pipeline.records import INTERVENTION_FILE

STAGES = ("label", "train", "evaluate", "score", "select")
"""The stages of `dvc.yaml`, in order (a test compares the two)."""


class Layout(Struct, frozen=True):
    """The paths below a workspace's root."""

    root: Path = Path()

    # Tracked by git ------------------------------------------------------------------------------------------
    @property
    def marker(self) -> Path:
        """Marks the folder as a workspace: its id and layout version."""
        return self.root / "al-workspace.json"

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def dvc_yaml(self) -> Path:
        return self.root / "dvc.yaml"

    @property
    def dvc_lock(self) -> Path:
        return self.root / "dvc.lock"

    @property
    def engine(self) -> Path:
        """The engine's fingerprint at the start of the latest build; a dependency of every stage."""
        return self.root / "engine.json"

    @property
    def plugins(self) -> Path:
        """The user's modules with models and query strategies, each a file."""
        return self.root / "plugins"

    @property
    def rounds(self) -> Path:
        return self.root / "rounds"

    @property
    def project(self) -> Path:
        """The id of the Label Studio project, without address or token."""
        return self.rounds / "project.json"

    @property
    def overrides(self) -> Path:
        """One-off settings of the batch that the next build selects."""
        return self.rounds / "overrides.json"

    @property
    def asked_at_random(self) -> Path:
        """The pool items that were ever sampled at random, on which the control model is trained."""
        return self.rounds / "random.json"

    @property
    def control(self) -> Path:
        """The score on the test set of the control model, which is trained on the random labels alone."""
        return self.rounds / "control.json"

    @property
    def metrics(self) -> Path:
        return self.rounds / "metrics.json"

    @property
    def confusion_csv(self) -> Path:
        """Actual and predicted class of each labelled test item, for `dvc plots`."""
        return self.rounds / "confusion.csv"

    @property
    def metrics_csv(self) -> Path:
        return self.rounds / "metrics.csv"

    @property
    def predictions(self) -> Path:
        """The newest model's probabilities for the labelled test set."""
        return self.rounds / "predictions.csv"

    @property
    def histogram(self) -> Path:
        """Histogram of the newest model's acquisition scores on the unlabelled pool."""
        return self.rounds / "histogram.json"

    @property
    def choice(self) -> Path:
        """The strategy that selected the newest batch, and the reason."""
        return self.rounds / "choice.json"

    @property
    def guided(self) -> Path:
        """Ids of the candidates most similar to the guide texts of a class in `select.guide`."""
        return self.rounds / "guided.json"

    @property
    def results(self) -> tuple[Path, ...]:
        """The outputs of stages that git tracks (a test compares them with `dvc.yaml`)."""
        measured = (self.metrics, self.metrics_csv, self.confusion_csv, self.predictions, self.control)
        return (*measured, self.histogram, self.guided, self.choice)

    @property
    def genesis(self) -> Path:
        """The record of the first build, before any round."""
        return self.rounds / "genesis.json"

    @property
    def interventions(self) -> Path:
        """The records of interventions, from `000001.json` on; append-only."""
        return self.rounds / "interventions"

    def intervention(self, number: int) -> Path:
        return self.interventions / f"{number:06d}.json"

    @property
    def reviews(self) -> Path:
        """The plans of reviews, from `000001.jsonl` on; append-only."""
        return self.rounds / "reviews"

    def review(self, number: int) -> Path:
        """The plan of review `number`, one PlannedTask a line."""
        return self.reviews / f"{number:06d}.jsonl"

    @property
    def review_project(self) -> Path:
        """The id of the review project in Label Studio, like `project`."""
        return self.rounds / "review_project.json"

    def round(self, number: int) -> Path:
        return self.rounds / f"{number:04d}"

    def plan(self, number: int) -> Path:
        """The plan of round `number`, one PlannedTask a line."""
        return self.round(number) / "plan.jsonl"

    def live_plan(self, number: int) -> Path:
        """The questions that were asked live in round `number`, one LiveQuestion a line; append-only."""
        return self.round(number) / "live.jsonl"

    def record(self, number: int) -> Path:
        """The manifest of round `number`: parent, hashes, counts, parameters, metrics, decision, engine."""
        return self.round(number) / "round.json"

    def decision(self, number: int | None) -> tuple[Path, Path]:
        """What the decision on the build of round `number` writes (None: of the first build): record, next plan."""
        return (self.genesis, self.plan(0)) if number is None else (self.record(number), self.plan(number + 1))

    # Tracked by DVC: sources (`dvc add`) -----------------------------------------------------------------------
    @property
    def pool(self) -> Path:
        return self.root / "data/pool"

    @property
    def test(self) -> Path:
        return self.root / "data/test"

    @property
    def events(self) -> Path:
        """The ledger: `part-*.jsonl`, and `refused-*.jsonl` for answers that were refused, with the reason."""
        return self.root / "data/events"

    @property
    def encoder(self) -> Path:
        """The encoder's weights, as the workspace's own copy."""
        return self.root / "models/encoder"

    @property
    def sources(self) -> tuple[Path, ...]:
        return (self.pool, self.test, self.events, self.encoder)

    @property
    def pointers(self) -> tuple[Path, ...]:
        """The `.dvc` files of `sources`, in their order."""
        return tuple(map(pointer_of, self.sources))

    # Tracked by DVC: outputs of stages -------------------------------------------------------------------------
    @property
    def labeled(self) -> Path:
        return self.root / "data/labeled.parquet"

    @property
    def test_labels(self) -> Path:
        return self.root / "data/test_labels.parquet"

    @property
    def unresolved(self) -> Path:
        return self.root / "data/unresolved.parquet"

    @property
    def model(self) -> Path:
        return self.root / "models/candidate"

    @property
    def scores(self) -> Path:
        return self.root / "data/scores.parquet"

    @property
    def queries(self) -> Path:
        return self.root / "data/queries.jsonl"

    # Ignored by git: what is not published, and what can be recreated ------------------------------------------
    @property
    def inbox(self) -> Path:
        """Items and events since the last close; no stage reads it."""
        return self.root / "data/inbox"

    @property
    def inbox_pool(self) -> Path:
        return self.inbox / "pool"

    @property
    def inbox_test(self) -> Path:
        return self.inbox / "test"

    @property
    def inbox_events(self) -> Path:
        return self.inbox / "events"

    @property
    def rejects(self) -> Path:
        """Rows that `al ingest` rejected, each with its reason."""
        return self.root / "data/rejects"

    @property
    def private(self) -> Path:
        return self.root / ".al"

    @property
    def features(self) -> Path:
        """The cache of feature vectors, by encoder fingerprint; may be deleted."""
        return self.private / "features"

    @property
    def terms(self) -> Path:
        """The cache of TF-IDF vocabularies and rows; may be deleted."""
        return self.private / "terms"

    @property
    def lock(self) -> Path:
        return self.private / "lock"

    @property
    def clone(self) -> Path:
        """The clone's id and path; see `identity`."""
        return self.private / "clone.json"

    @property
    def dvc_process(self) -> Path:
        """The record of the process that runs DVC's commands, while there is one."""
        return self.private / "dvc.json"

    @property
    def pull_state(self) -> Path:
        """The position of the last pull; without it the next pull is a full one."""
        return self.private / "pull.json"

    @property
    def review_state(self) -> Path:
        """The position of the last pull from the review project; like `pull_state`."""
        return self.private / "pull_review.json"

    @property
    def review_facts(self) -> Path:
        """What the last tick that chose labels for review knew; without it the next one chooses again."""
        return self.private / "review.json"

    @property
    def ingested(self) -> Path:
        """The state of the files in `ingest.sources` at the last tick."""
        return self.private / "ingested.json"

    @property
    def encoding(self) -> Path:
        """The record of the process that encodes texts, while there is one."""
        return self.private / "encode.json"

    @property
    def probe(self) -> Path:
        """What workers on other machines are compared with; see `features.remote`."""
        return self.private / "probe.json"

    @property
    def plans_read(self) -> Path:
        """Plans of published rounds as they were parsed; may be deleted."""
        return self.private / "plans"

    @property
    def encoded(self) -> Path:
        """What the cache of feature vectors was last filled for; see `build.encode`."""
        return self.private / "encoded.json"

    @property
    def progress(self) -> Path:
        """The progress of a long stage, for the progress bar."""
        return self.private / "progress.json"

    @property
    def live(self) -> Path:
        """What `al live` keeps: its state, its lock, the pool's features; may be deleted while it does not run."""
        return self.private / "live"

    @property
    def traffic(self) -> Path:
        """What `al serve` keeps of requests and answers (`serve.log`), see `traffic.store`; it is not recreated."""
        return self.private / "traffic"

    @property
    def drift(self) -> Path:
        """What the newest look at kept requests found; see `drift.look`."""
        return self.private / "drift.json"

    @property
    def looking(self) -> Path:
        """The process that looks at them now."""
        return self.private / "looking.json"

    @property
    def logs(self) -> Path:
        return self.private / "logs"

    @property
    def outbox(self) -> Path:
        """What people were told, and what they are to be told; see `notifications.outbox`."""
        return self.private / "outbox.json"

    @property
    def closing(self) -> Path:
        """The parts written by a close that is not committed yet."""
        return self.private / "closing.json"

    @property
    def build(self) -> Path:
        """The finished steps of the current build, with their inputs. May be lost."""
        return self.private / "build.json"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    def state(self, number: int) -> Path:
        """Times and attempts of round `number`. May be lost."""
        return self.private / "rounds" / f"{number:04d}.json"

    @property
    def ignored(self) -> tuple[str, ...]:
        """Lines of the workspace's `.gitignore`: DVC's files, and local files."""
        outputs = (self.labeled, self.test_labels, self.unresolved, self.model, self.scores, self.queries)
        data = tuple(f"/{path.relative_to(self.root).as_posix()}" for path in (*self.sources, *outputs))
        return ("/.al/", "/data/inbox/", "/data/rejects/", "/reports/", *data)

    @property
    def not_ignored(self) -> tuple[str, ...]:
        """Lines of the workspace's `.gitignore` that keep users' own patterns from hiding the engine's files.

        They override `.git/info/exclude` and the user's global file; DVC refuses an ignored `.dvc` file, and asks about
        its folder before that exists: as a file.
        """
        roots = (self.marker, self.params, self.dvc_yaml, self.dvc_lock, self.engine)
        names = (*(path.relative_to(self.root).as_posix() for path in roots), ".gitignore", ".gitattributes")
        dvc = (".dvcignore", ".dvc", ".dvc/config", ".dvc/.gitignore")
        folders = ("rounds/", "rounds/*/", "data/", "models/")
        files = ("rounds/*.json", "rounds/*.csv", "rounds/*/*.json", "rounds/*/*.jsonl", "data/*.dvc", "models/*.dvc")
        return tuple(f"!/{name}" for name in (*names, *dvc, *folders, *files))

    @property
    def attributes(self) -> tuple[str, ...]:
        """Lines of the workspace's `.gitattributes` that make git store and check out our files byte for byte.

        They override the user's global file and settings such as `core.autocrlf`.
        """
        roots = (self.marker, self.params, self.dvc_yaml, self.dvc_lock, self.engine)
        names = (*(path.relative_to(self.root).as_posix() for path in roots), ".gitignore", ".gitattributes")
        places = (*names, ".dvcignore", ".dvc/**", "rounds/**", "data/*.dvc", "models/*.dvc")
        return tuple(f"/{name} -text -ident -filter !working-tree-encoding" for name in places)

    @property
    def steering(self) -> tuple[Path, ...]:
        """Small tracked files that affect a build, DVC or git."""
        ours = (self.params, self.dvc_yaml, self.dvc_lock, self.engine, self.overrides, self.asked_at_random)
        settings = tuple(self.root / name for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore"))
        return (*ours, *settings, *self.results, *self.pointers)

    @property
    def of_dvc(self) -> tuple[Path, ...]:
        """DVC's files in git."""
        return (self.dvc_yaml, self.dvc_lock, *self.pointers)

    @property
    def tracked(self) -> tuple[Path, ...]:
        """All tracked paths of the engine: those it owns, and those the user edits."""
        user = (
            self.marker,
            self.params,
            self.dvc_yaml,
            self.git_ignore,
            self.git_attributes,
            self.root / ".dvc/config",
        )
        return (*self.owned, *user)

    @property
    def git_attributes(self) -> Path:
        return self.root / ".gitattributes"

    @property
    def git_ignore(self) -> Path:
        return self.root / ".gitignore"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders that the engine or DVC writes to; none may be a link that leads out of the workspace."""
        private = ("features", "live", "logs", "plans", "published", "rounds", "terms", "traffic")
        names = (*(f".al/{name}" for name in private), ".dvc/cache", ".dvc/tmp")
        inner = (self.inbox, self.inbox_pool, self.inbox_test, self.inbox_events, self.rejects, self.reports)
        return (
            *(self.private, self.rounds, self.root / ".dvc", self.root / "data", self.root / "models"),
            *(*self.sources, self.model, *inner, *(self.root / name for name in names)),
        )

    @property
    def owned(self) -> tuple[Path, ...]:
        """Paths that the engine writes and commits; an unexpected change in one of them stops a tick."""
        return (self.engine, self.dvc_lock, self.rounds, *self.pointers)


def pointer_of(path: Path) -> Path:
    """The `.dvc` file with which `dvc add` tracks `path`."""
    return path.with_name(f"{path.name}.dvc")


_IN_ROUNDS = re.compile(
    rf"rounds/\d{{4,6}}/(?:plan\.jsonl|live\.jsonl|round\.json)|rounds/reviews/\d{{6}}\.jsonl|{INTERVENTION_FILE}"
)


def is_ours(name: str) -> bool:
    """Whether the engine writes and commits the file of this name, relative to the workspace's root.

    Other files in `rounds/`, such as an editor's backup, are not ours.
    """
    layout = Layout()
    singles = (
        *(
            layout.marker,
            layout.engine,
            layout.dvc_lock,
            layout.project,
            layout.review_project,
            layout.overrides,
            layout.asked_at_random,
        ),
        *(layout.genesis, *layout.results, *layout.pointers),
    )
    return bool(_IN_ROUNDS.fullmatch(name)) or name in {path.as_posix() for path in singles}
