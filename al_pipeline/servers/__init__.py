"""The workspace's own Label Studio, Prefect server and worker, on loopback; their files lie outside the workspace."""

from al_pipeline.servers.label_studio_server import (
    Account,
    Invited,
    Stored,
    StoredAnswer,
    admin,
    install,
    invite,
    label_studio_status,
    reset_password,
    start_label_studio,
    stop_label_studio,
    stored_answers,
)
from al_pipeline.servers.live import live_status, start_live, stop_live
from al_pipeline.servers.prefect_server import (
    Deployment,
    PrefectApi,
    password_file,
    prefect_elsewhere,
    prefect_environment,
    prefect_status,
    read_deployment,
    start_prefect,
    stop_prefect,
)
from al_pipeline.servers.process import Progress, Server
from al_pipeline.servers.status import ServiceRow, end_all_in, label_studio_elsewhere, running_in, services
from al_pipeline.servers.worker import start_worker, stop_worker, worker_status

__all__ = [
    "Account",
    "Deployment",
    "Invited",
    "PrefectApi",
    "Progress",
    "Server",
    "ServiceRow",
    "Stored",
    "StoredAnswer",
    "admin",
    "end_all_in",
    "install",
    "invite",
    "reset_password",
    "label_studio_elsewhere",
    "label_studio_status",
    "live_status",
    "password_file",
    "prefect_elsewhere",
    "prefect_environment",
    "prefect_status",
    "read_deployment",
    "running_in",
    "services",
    "start_label_studio",
    "start_live",
    "start_prefect",
    "start_worker",
    "stop_label_studio",
    "stop_live",
    "stop_prefect",
    "stop_worker",
    "stored_answers",
    "worker_status",
]
