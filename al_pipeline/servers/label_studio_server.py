"""A Label Studio of the workspace's own, for those who have none: on SQLite and loopback, without sign-ups.

A new database takes a minute of migrations, so an empty migrated one is kept for the machine and copied. It holds no
user, no organisation and no key: each copy makes its own at its first start.
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
# Its own command, which takes the password as an argument: given inside, it shows in no list of processes.
_RESET = """\
import sys
from label_studio.server import main
sys.argv.append("--password=" + sys.stdin.read())
sys.exit(main())
"""


@dataclass(frozen=True, slots=True)
class Account:
    """The embedded server's administrator; kept in `file`, which only its owner can read."""

    email: str
    password: str = field(repr=False)
    token: str = field(repr=False)
    file: Path


class Invited(NamedTuple):
    """What a new annotator needs, shown once and kept nowhere: a password for the page, a token for the API."""

    password: str
    token: str


def start_label_studio(workspace: Workspace, progress: Progress) -> Server:
    """The workspace's Label Studio; installs and starts it where needed, and stores its address and token.

    Raises ServerFailed where it does not start, LabelStudioRefused where it no longer takes our token, UsageError where
    the workspace is connected to another Label Studio.
    """
    home = private_folder(workspace.home / "label-studio")
    with process.exclusive(home / "account.lock", _INSTALL_SECONDS):
        account = _account(home)
        _refuse_other_server(workspace)
        venv = install(progress)
        # An account never seen to work belongs to a first start that was killed: nothing can be in its database.
        if not _proven(account):
            stop_label_studio(workspace)
            _new_database(venv, home, progress)
        server = process.start(_service(home, venv, account), progress)
        if not _accepts(server.url, account):
            raise LabelStudioRefused(
                f"Label Studio at {server.url} runs but refuses the token in {account.file}; switch legacy tokens on "
                f"in its organisation page (log in as {account.email}), or give another one by `al labelstudio connect`"
            )
        _store(account, proven=True)
        if workspace.credentials().get("token") != account.token or workspace.credentials().get("url") != server.url:
            workspace.store_credentials(server.url, account.token)
        return server


def stop_label_studio(workspace: Workspace) -> bool:
    """End the workspace's Label Studio and keep its data; False where none ran."""
    return process.stop(_service(workspace.home / "label-studio"))


def label_studio_status(workspace: Workspace) -> Server | None:
    """The workspace's Label Studio, if it runs and is well."""
    return process.status(_service(workspace.home / "label-studio"))


def admin(workspace: Workspace) -> Account | None:
    """The administrator of the workspace's own Label Studio; None where it has none of its own."""
    return _stored_account(workspace.home / "label-studio")


class StoredAnswer(NamedTuple):
    """An annotation or skip in the database of a Label Studio that need not run."""

    push_key: str | None
    annotation_id: int
    annotator: str
    updated_at: datetime


class Stored(NamedTuple):
    """What people made in a Label Studio: its projects (title and description), and all answers."""

    projects: tuple[tuple[str, str], ...]
    answers: tuple[StoredAnswer, ...]


def stored_answers(home: Path) -> Stored:
    """What the database of the Label Studio in `home` holds; nothing where it has none. Raises ServerFailed."""
    import sqlite3

    database = home / "data" / _DATABASE
    if not database.exists():
        return Stored((), ())
    try:
        # Not read-only: what a killed server left half written is rolled back by whoever reads next.
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
    """Make an account for an annotator, by an invitation link, without a browser.

    Raises BadInput for an address that is not one or is taken, LabelStudioDown and LabelStudioRefused.
    """
    import httpx

    known = workspace.credentials()
    if "url" not in known or "token" not in known:
        raise LabelStudioRefused("no Label Studio is known here; `al labelstudio start` runs one")
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
    """Give an annotator of the workspace's own Label Studio a new password, which is returned; the old one is void.

    Their annotations and API token stay. The server may run or not. Raises BadInput for an address without an account,
    UsageError where the accounts are not ours to change, ServerFailed.
    """
    home = workspace.home / "label-studio"
    account = admin(workspace)
    if url := connected_elsewhere(workspace):
        raise UsageError(f"this workspace uses the Label Studio at {url}; whoever administers that sets passwords")
    if account is None or not (home / "data" / _DATABASE).exists():
        raise UsageError("this workspace has no Label Studio of its own yet; `al labelstudio start` makes one")
    if email == account.email:
        raise UsageError(f"{email} is the administrator, whose password lies in {account.file}")
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
        raise BadInput(f"{email} has no account in this Label Studio; `al labelstudio invite {email}` makes one")
    raise ServerFailed(f"Label Studio did not set the password (code {done.returncode})")


def install(progress: Progress) -> Path:
    """The virtual environment that holds Label Studio: AL_LABEL_STUDIO_VENV, what `make setup` made, else our own.

    An environment whose making was cut short is made again. Raises ServerFailed, UsageError.
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
            private_folder(venv)  # what is in it is run
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
    """Exact versions of all that the environment holds, as pip reads them."""
    return (resources.files("al_pipeline") / "locks/label-studio.lock").read_text(encoding="utf-8")


def installed_version(venv: Path) -> str:
    """The version of the Label Studio in `venv`. Raises UsageError where there is none."""
    for folder in venv.glob("lib/python*/site-packages/label_studio-*.dist-info"):
        if (venv / "bin/label-studio").exists():
            return folder.name.removeprefix("label_studio-").removesuffix(".dist-info")
    raise UsageError(f"there is no Label Studio in {venv} (AL_LABEL_STUDIO_VENV); unset it, and `al` makes its own")


def template_database(venv: Path, progress: Progress) -> Path:
    """An empty, migrated database of the version in `venv`; made once for the machine, without users or keys."""
    template = al_home() / "templates" / f"label-studio-{installed_version(venv)}.sqlite3"
    with process.exclusive(template.with_suffix(".lock"), _MIGRATE_SECONDS):
        if not template.exists():
            with tempfile.TemporaryDirectory(prefix="al-template-", dir=template.parent) as folder:
                _migrate(venv, Path(folder), progress)
                (Path(folder) / "data" / _DATABASE).replace(template)
    return template


def _migrate(venv: Path, home: Path, progress: Progress) -> None:
    """`label-studio version` brings the database up to date, prints, and ends."""
    (home / "data").mkdir()
    _run(
        [*_program(venv), "version", "--data-dir", str(home / "data")],
        {**process.inherited_environment(), **_quiet(home)},
        home / "migrate.log",
        _MIGRATE_SECONDS,
        "preparing Label Studio's database (once)",
        progress,
    )


def _service(home: Path, venv: Path | None = None, account: Account | None = None) -> Service:
    """How Label Studio is run in `home`; without `venv` and `account` it can be looked at and stopped, not started."""

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
    """No telemetry, no version check, no sign-ups, no files of this machine served, nothing written outside `home`.

    Whoever has an account may do everything in Label Studio, so what must not be possible is switched off here.
    """
    return {
        "HOME": str(home),
        "LABEL_STUDIO_BASE_DATA_DIR": str(home / "data"),
        "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_ENABLE_LOCAL_FILES_STORAGE": "false",
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "false",  # unset, a folder `mydata` would switch it on
        "LABEL_STUDIO_SSRF_PROTECTION_ENABLED": "true",
        "LABEL_STUDIO_ALLOWED_HOSTS": f"{LOOPBACK},localhost",  # a page elsewhere must not pass for this one
        "LABEL_STUDIO_CORS_ALLOW_ALL_ORIGINS": "false",
        "SENTRY_DSN": "",  # empty, not unset: an address is built in
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
    """The stored account, or a new one, written down before anything uses it."""
    found = _stored_account(home)
    if found is not None:
        return found
    if (home / "data" / _DATABASE).exists():
        raise LabelStudioRefused(
            f"{home / 'data'} holds a Label Studio database, but {home / 'account.json'}, which opens it, is gone; "
            "bring it back, or move the database aside to begin a new one"
        )
    account = Account(ADMIN_EMAIL, secrets.token_urlsafe(18), secrets.token_hex(20), home / "account.json")
    _store(account, proven=False)
    return account


def _stored_account(home: Path) -> Account | None:
    found = read_json(home / "account.json")
    if found is None:
        return None
    return Account(found["email"], found["password"], found["token"], home / "account.json")


def _proven(account: Account) -> bool:
    return bool(read_json(account.file)["proven"])


def _store(account: Account, *, proven: bool) -> None:
    content = {"email": account.email, "password": account.password, "token": account.token, "proven": proven}
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
    """The address of a Label Studio that is not the workspace's own, where it was told to use one."""
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

    # A proxy in the environment is not for a server on loopback.
    local = httpx.URL(url).host in (LOOPBACK, "localhost", "::1")
    return httpx.Client(base_url=url, timeout=_REQUEST_SECONDS, trust_env=not local)


def _authorization(client: httpx.Client, token: str) -> dict[str, str]:
    """The header that says who we are. Raises LabelStudioRefused for a token that has expired."""
    try:
        return Authorization(token, lambda path, body: _json(client.post(f"/{path}", json=dict(body)))).header()
    except TokenExpired as error:
        raise LabelStudioRefused(f"the token of Label Studio is refused: {error}") from None


def _json(reply: httpx.Response) -> dict[str, str]:
    """The body; never quoted in an error, nor are the headers, since they can hold secrets."""
    if reply.status_code != 200:
        raise LabelStudioRefused(
            f"Label Studio answered {reply.status_code} to {reply.request.method} {reply.url.path}"
        )
    found: dict[str, str] = reply.json()
    return found


def _why_not_invited(reply: httpx.Response, email: str) -> str:
    if "already exists" in reply.text:
        return f"{email} has an account here already; `al labelstudio password {email}` gives it a new password"
    if reply.status_code == 200:
        return f"Label Studio does not take {email} as an e-mail address"
    return f"Label Studio answered {reply.status_code} to the sign-up of {email}"


def _run(
    command: Sequence[str],
    environment: Mapping[str, str] | None,
    log: Path,
    timeout: float,
    doing: str,
    progress: Progress,
) -> None:
    """Run to the end, output to `log`, telling every few seconds how long it has taken. Raises ServerFailed."""
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
            f"{doing}: ended with code {child.returncode}; its last words ({log}):\n{process.last_lines(log)}"
        )
