"""The workspace's own Label Studio: on SQLite and loopback, without public sign-up.

Migrating a new database takes a minute, so the machine keeps an empty migrated one as a template. The template holds no
user, organisation or key: each copy creates its own at its first start.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from al_pipeline.errors import BadInput, LabelStudioDown, LabelStudioRefused, ServerFailed, UsageError
from al_pipeline.files import read_json, replacing, sha256_bytes, write_json, write_text
from al_pipeline.integrations.label_studio.tokens import Authorization, TokenExpired
from al_pipeline.logs import get_logger, shown
from al_pipeline.sanitize import has_tls
from al_pipeline.servers import process
from al_pipeline.servers.process import LOOPBACK, Progress, Server, Service
from al_pipeline.workspace.home import al_home, check_private, private_folder
from al_pipeline.workspace.workspace import Workspace

_logger = get_logger(__name__)

if TYPE_CHECKING:
    import httpx

LABEL_STUDIO_VERSION = "1.23.2"
ADMIN_EMAIL = "admin@localhost.localdomain"

_START_SECONDS = 300.0
_INSTALL_SECONDS = 3600.0
_MIGRATE_SECONDS = 900.0
_REQUEST_SECONDS = 30.0
_DATABASE = "label_studio.sqlite3"
# Label Studio's own command takes the password as an argument. Appended inside the process, the password does not show
# in the process list.
_RESET = """\
import sys
from label_studio.server import main
sys.argv.append("--password=" + sys.stdin.read())
sys.exit(main())
"""
# The program `label-studio`. Django builds all models anew for each of hundreds of migrations; with Python's own
# thresholds it would spend a third of the time on looking for garbage among them.
PREPARE = """\
import gc, sys
gc.set_threshold(50_000, 20, 50)
from label_studio.server import main
sys.exit(main())
"""


@dataclass(frozen=True, slots=True)
class Account:
    """The server's administrator; stored in `file`, readable by its owner only."""

    email: str
    password: str = field(repr=False)
    token: str = field(repr=False)
    file: Path


class Invited(NamedTuple):
    """A new annotator's password for the page and token for the API; shown once and not stored."""

    password: str
    token: str


def start_label_studio(workspace: Workspace, progress: Progress) -> Server:
    """Return the workspace's Label Studio, after installing and starting it if needed; store its address and token.

    Raises ServerFailed if it does not start, LabelStudioRefused if it rejects the stored token, UsageError if the
    workspace is connected to another Label Studio.
    """
    home = private_folder(workspace.home / "label-studio")
    with process.exclusive(home / "account.lock", _INSTALL_SECONDS):
        account = _account(home)
        _refuse_other_server(workspace)
        venv = install(progress)
        # An account that never logged in comes from an interrupted first start: its database holds no data.
        if not _verified(account):
            stop_label_studio(workspace)
            _new_database(venv, home, progress)
        server = process.start(_service(home, venv, account), progress)
        if not _accepts(server.url, account):
            raise LabelStudioRefused(
                f"Label Studio at {server.url} runs but rejects the token in {account.file}; enable legacy tokens on "
                f"its organisation page (log in as {account.email}), or give another one to `al labelstudio connect`"
            )
        _store(account, verified=True)
        if workspace.credentials().get("token") != account.token or workspace.credentials().get("url") != server.url:
            workspace.store_credentials(server.url, account.token)
        return server


def stop_label_studio(workspace: Workspace) -> bool:
    """Stop the workspace's Label Studio and keep its data; False if it did not run."""
    return process.stop(_service(workspace.home / "label-studio"))


def label_studio_status(workspace: Workspace) -> Server | None:
    """The workspace's Label Studio if it runs and is healthy, else None."""
    return process.status(_service(workspace.home / "label-studio"))


def admin(workspace: Workspace) -> Account | None:
    """The administrator of the workspace's own Label Studio; None if it has none of its own."""
    return _stored_account(workspace.home / "label-studio")


class StoredAnswer(NamedTuple):
    """An annotation or skip, as Label Studio's database holds it."""

    push_key: str | None
    annotation_id: int
    annotator: str
    updated_at: datetime


class Stored(NamedTuple):
    """The contents of a Label Studio: its projects (title and description), and all annotations and skips."""

    projects: tuple[tuple[str, str], ...]
    answers: tuple[StoredAnswer, ...]


def stored_answers(home: Path) -> Stored:
    """Read the database of the Label Studio in `home`, which need not run; empty if there is no database.

    Raises ServerFailed if the database cannot be read.
    """
    import sqlite3

    database = home / "data" / _DATABASE
    if not database.exists():
        return Stored((), ())
    try:
        # Not read-only: the next reader must roll back a transaction that a killed server left unfinished.
        with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True, timeout=10)) as connection:
            projects = connection.execute("SELECT title, description FROM project").fetchall()
            answers = connection.execute(
                "SELECT json_extract(task.data, '$.push_key'), answer.id, htx_user.email, answer.updated_at "
                "FROM task_completion AS answer LEFT JOIN task ON task.id = answer.task_id "
                "LEFT JOIN htx_user ON htx_user.id = answer.completed_by_id"
            ).fetchall()
            return Stored(
                tuple((title or "", description or "") for title, description in projects),
                tuple(
                    StoredAnswer(key, number, email or "somebody", datetime.fromisoformat(at).replace(tzinfo=UTC))
                    for key, number, email, at in answers
                ),
            )
    except (sqlite3.Error, ValueError, TypeError) as error:
        raise ServerFailed(f"Label Studio's database {database} cannot be read ({error})") from None


def invite(workspace: Workspace, email: str) -> Invited:
    """Create an account for an annotator through an invitation link, without a browser.

    Raises BadInput for an address that is invalid or taken, LabelStudioDown if the server does not answer,
    LabelStudioRefused if it is unknown or rejects the request.
    """
    import httpx

    known = workspace.credentials()
    if "url" not in known or "token" not in known:
        raise LabelStudioRefused("this workspace has no Label Studio yet; `al labelstudio start` starts one")
    password = secrets.token_urlsafe(15)
    try:
        with _client(known["url"]) as ours, _client(known["url"]) as theirs:
            link = _json(ours.get("/api/invite", headers=_authorization(ours, known["token"])))["invite_url"]
            page = theirs.get(link).text
            found = re.search(r'csrfmiddlewaretoken" value="([^"]+)', page)
            if found is None:
                raise LabelStudioRefused("Label Studio shows no sign-up form behind its invitation link")
            form = {"csrfmiddlewaretoken": found.group(1), "email": email, "password": password}
            reply = theirs.post(link, data=form, headers={"Referer": str(theirs.base_url.join(link))})
            if reply.status_code != 302:
                raise BadInput(_why_not_invited(reply, email))
            return Invited(password, _json(theirs.get("/api/current-user/token"))["token"])
    except httpx.HTTPError as error:
        raise LabelStudioDown(f"Label Studio at {known['url']} did not answer ({type(error).__name__})") from error


def reset_password(workspace: Workspace, email: str) -> str:
    """Set a new password for an annotator of the workspace's own Label Studio, and return it.

    Annotations and API token stay. The server need not run. Raises BadInput for an address without an account,
    UsageError if the workspace does not manage the accounts, ServerFailed if Label Studio's command fails.
    """
    home = workspace.home / "label-studio"
    account = admin(workspace)
    if url := connected_elsewhere(workspace):
        raise UsageError(f"this workspace uses the Label Studio at {url}; ask its administrator for a new password")
    if account is None or not (home / "data" / _DATABASE).exists():
        raise UsageError("this workspace has no Label Studio of its own yet; `al labelstudio start` creates one")
    if email == account.email:
        raise UsageError(f"{email} is the administrator, whose password is in {account.file}")
    venv, password = install(lambda _: None), secrets.token_urlsafe(15)
    try:
        done = subprocess.run(
            (
                str(venv / "bin/python"),
                "-c",
                _RESET,
                "reset_password",
                f"--username={email}",
                "--data-dir",
                str(home / "data"),
            ),
            input=password,
            env={**process.inherited_environment(), **_quiet(home)},
            cwd=home,
            capture_output=True,
            text=True,
            timeout=_START_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ServerFailed(f"Label Studio did not set the password within {_START_SECONDS:.0f} s") from None
    if "successfully changed" in done.stdout:
        return password
    if "not found" in done.stdout:
        raise BadInput(f"{email} has no account in this Label Studio; `al labelstudio invite {email}` creates one")
    raise ServerFailed(f"Label Studio did not set the password (code {done.returncode})")


def install(progress: Progress) -> Path:
    """The virtual environment of Label Studio: AL_LABEL_STUDIO_VENV, that of `make setup`, or else one installed here.

    An incomplete installation is repeated. Raises ServerFailed if pip fails, UsageError if AL_LABEL_STUDIO_VENV
    holds no Label Studio.
    """
    beside = Path(sys.prefix).with_name(".venv-label-studio")
    given = os.environ.get("AL_LABEL_STUDIO_VENV") or (beside if (beside / ".ready").is_file() else None)
    if given:
        installed_version(Path(given))
        return Path(given)
    venv = _default_venv()
    lock = _lock()
    fingerprint = sha256_bytes(f"{sys.version_info[:2]}\n{lock}".encode())
    with process.exclusive(venv.with_name(f"{venv.name}.lock"), _INSTALL_SECONDS):
        check_private(venv)
        if read_json(venv / ".ready", {}).get("lock") != fingerprint:
            shutil.rmtree(venv, ignore_errors=True)
            constraints = venv.with_name(f"{venv.name}.txt")
            write_text(constraints, lock)
            log = venv.with_name(f"{venv.name}.log")
            log.unlink(missing_ok=True)
            private_folder(venv)  # its content is executed
            _run(
                [sys.executable, "-m", "venv", str(venv)],
                None,
                log,
                _INSTALL_SECONDS,
                "installing Label Studio",
                progress,
            )
            pip = [str(venv / "bin/python"), "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
            quiet = ["--progress-bar", "off", "-r", str(constraints)]
            _run([*pip, *quiet], None, log, _INSTALL_SECONDS, "installing Label Studio (1 GB, once)", progress)
            write_json(venv / ".ready", {"lock": fingerprint})
    return venv


def _lock() -> str:
    """Exact versions of all packages of the environment, in pip's format."""
    return (resources.files("al_pipeline") / "locks/label-studio.lock").read_text(encoding="utf-8")


def installed_version(venv: Path) -> str:
    """The version of the Label Studio in `venv`. Raises UsageError if there is none."""
    for folder in venv.glob("lib/python*/site-packages/label_studio-*.dist-info"):
        if (venv / "bin/label-studio").exists():
            return folder.name.removeprefix("label_studio-").removesuffix(".dist-info")
    raise UsageError(f"there is no Label Studio in {venv} (AL_LABEL_STUDIO_VENV); unset it, and `al` installs its own")


def template_database(venv: Path, progress: Progress) -> Path:
    """An empty, migrated database for the version in `venv`, without users or keys; created once per machine."""
    template = al_home() / "templates" / f"label-studio-{installed_version(venv)}.sqlite3"
    with process.exclusive(template.with_suffix(".lock"), _MIGRATE_SECONDS):
        if not template.exists():
            with tempfile.TemporaryDirectory(prefix="al-template-", dir=template.parent) as folder:
                _migrate(venv, Path(folder), progress)
                (Path(folder) / "data" / _DATABASE).replace(template)
    return template


def _migrate(venv: Path, home: Path, progress: Progress) -> None:
    """Create a migrated database: `label-studio version` runs the migrations, prints the version and exits."""
    (home / "data").mkdir()
    _run(
        [str(venv / "bin/python"), "-c", PREPARE, "version", "--data-dir", str(home / "data")],
        {**process.inherited_environment(), **_quiet(home)},
        home / "migrate.log",
        _MIGRATE_SECONDS,
        "preparing Label Studio's database (once)",
        progress,
    )


def _service(home: Path, venv: Path | None = None, account: Account | None = None) -> Service:
    """The Label Studio service in `home`; without `venv` and `account` it can be inspected and stopped, not started."""

    def command(port: int) -> Sequence[str]:
        where = ("--internal-host", LOOPBACK, "--port", str(port), "--data-dir", str(home / "data"))
        return (*_program(venv or _default_venv()), "start", "--no-browser", "--log-level", "WARNING", *where)

    def environment(port: int) -> Mapping[str, str]:
        if account is None:
            return _quiet(home)
        login = {"USERNAME": account.email, "PASSWORD": account.password, "USER_TOKEN": account.token}
        return {**_quiet(home), **{f"LABEL_STUDIO_{name}": value for name, value in login.items()}}

    return Service("Label Studio", home, command, environment, health="/health", timeout=_START_SECONDS)


def _quiet(home: Path) -> dict[str, str]:
    """Settings without telemetry, version check, public sign-up and local file serving; all data stays in `home`.

    In Label Studio every account has all rights, so what must not be possible is disabled here.
    """
    return {
        "HOME": str(home),
        "LABEL_STUDIO_BASE_DATA_DIR": str(home / "data"),
        "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_ENABLE_LOCAL_FILES_STORAGE": "false",
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "false",  # unset, a folder `mydata` would switch it on
        "LABEL_STUDIO_SSRF_PROTECTION_ENABLED": "true",
        "LABEL_STUDIO_ALLOWED_HOSTS": f"{LOOPBACK},localhost",  # against DNS rebinding
        "LABEL_STUDIO_CORS_ALLOW_ALL_ORIGINS": "false",
        "SENTRY_DSN": "",  # empty, not unset: the default is an address
        "FRONTEND_SENTRY_DSN": "",
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "LOG_LEVEL": "WARNING",
        "PYTHONUNBUFFERED": "1",
    }


def _program(venv: Path) -> tuple[str, str]:
    return str(venv / "bin/python"), str(venv / "bin/label-studio")


def _default_venv() -> Path:
    return al_home() / f"label-studio-{LABEL_STUDIO_VERSION}"


def _account(home: Path) -> Account:
    """The stored account, or a new one, stored before its first use. Raises LabelStudioRefused if its file is lost."""
    found = _stored_account(home)
    if found is not None:
        return found
    if (home / "data" / _DATABASE).exists():
        raise LabelStudioRefused(
            f"{home / 'data'} contains a Label Studio database, but {home / 'account.json'} with its login is "
            "missing; restore that file, or move the database away to start with a new one"
        )
    account = Account(ADMIN_EMAIL, secrets.token_urlsafe(18), secrets.token_hex(20), home / "account.json")
    _store(account, verified=False)
    return account


def _stored_account(home: Path) -> Account | None:
    found = read_json(home / "account.json")
    if found is None:
        return None
    return Account(found["email"], found["password"], found["token"], home / "account.json")


def _verified(account: Account) -> bool:
    return bool(read_json(account.file)["proven"])


def _store(account: Account, *, verified: bool) -> None:
    content = {"email": account.email, "password": account.password, "token": account.token, "proven": verified}
    if read_json(account.file) != content:
        write_json(account.file, content, mode=0o600)


def _new_database(venv: Path, home: Path, progress: Progress) -> None:
    template = template_database(venv, progress)
    database = private_folder(home / "data") / _DATABASE
    for left in (database, *database.parent.glob(f"{_DATABASE}-*")):
        left.unlink(missing_ok=True)
    with replacing(database, mode=0o600) as temporary:
        shutil.copyfile(template, temporary)


def connected_elsewhere(workspace: Workspace) -> str | None:
    """The address of the Label Studio that `al labelstudio connect` set; None if the workspace uses its own."""
    known: dict[str, str] = read_json(workspace.credentials_file, {})
    account = admin(workspace)
    if known and (account is None or known.get("token") != account.token):
        return known.get("url")
    return None


def _refuse_other_server(workspace: Workspace) -> None:
    if url := connected_elsewhere(workspace):
        raise UsageError(
            f"this workspace is connected to the Label Studio at {url}; "
            f"to use one of its own instead, delete {workspace.credentials_file} first"
        )


def _accepts(url: str, account: Account) -> bool:
    import httpx

    try:
        with _client(url) as client:
            reply = client.get("/api/current-user/whoami", headers={"Authorization": f"Token {account.token}"})
    except httpx.HTTPError as error:
        raise LabelStudioDown(f"Label Studio at {url} did not answer ({type(error).__name__})") from error
    return reply.status_code == 200 and reply.json().get("email") == account.email


def _client(url: str) -> httpx.Client:
    import httpx

    # A server on loopback is not behind the environment's proxy.
    local = httpx.URL(url).host in (LOOPBACK, "localhost", "::1")
    return httpx.Client(base_url=url, timeout=_REQUEST_SECONDS, trust_env=not local, verify=has_tls(url))


def _authorization(client: httpx.Client, token: str) -> dict[str, str]:
    """The authorization header. Raises LabelStudioRefused for an expired token."""
    try:
        return Authorization(token, lambda path, body: _json(client.post(f"/{path}", json=dict(body)))).header()
    except TokenExpired as error:
        raise LabelStudioRefused(f"Label Studio refuses the token: {error}") from None


def _json(reply: httpx.Response) -> dict[str, str]:
    """The body of a reply. Errors quote neither body nor headers: both can hold secrets."""
    if reply.status_code != 200:
        raise LabelStudioRefused(
            f"Label Studio answered {reply.status_code} to {reply.request.method} {reply.url.path}"
        )
    found: dict[str, str] = reply.json()
    return found


def _why_not_invited(reply: httpx.Response, email: str) -> str:
    if "already exists" in reply.text:
        return f"{email} already has an account; `al labelstudio password {email}` sets a new password"
    if reply.status_code == 200:
        return f"Label Studio does not accept {email} as an e-mail address"
    return f"Label Studio answered {reply.status_code} to the sign-up of {email}"


def _run(
    command: Sequence[str],
    environment: Mapping[str, str] | None,
    log: Path,
    timeout: float,
    doing: str,
    progress: Progress,
) -> None:
    """Run a command to its end, output to `log`; report the elapsed time every 10 s. Raises ServerFailed."""
    begin = reported = time.monotonic()
    progress(doing)
    with log.open("ab") as output:
        child = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, cwd=log.parent
        )
        with child:
            try:
                while child.poll() is None:
                    now = time.monotonic()
                    if now - begin > timeout:
                        raise ServerFailed(f"{doing}: not done after {timeout:.0f} s; its log is {log}")
                    if now - reported >= 10:
                        progress(f"{doing} ({now - begin:.0f} s)")
                        reported = now
                    time.sleep(0.2)
            finally:
                if child.poll() is None:
                    child.kill()
    _logger.debug("%s ended with %d after %.1f s", shown(command), child.returncode, time.monotonic() - begin)
    if child.returncode:
        raise ServerFailed(
            f"{doing}: exited with code {child.returncode}; end of its log ({log}):\n{process.last_lines(log)}"
        )
