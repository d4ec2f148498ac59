"""Servers for those who have none of their own: Label Studio and Prefect, on loopback, outside the workspace."""

from al_pipeline.servers.label_studio_server import (
    Account,
    Invited,
    admin,
    install,
    invite,
    label_studio_status,
    start_label_studio,
    stop_label_studio,
)
from al_pipeline.servers.prefect_server import (
    password_file,
    prefect_environment,
    prefect_status,
    start_prefect,
    stop_prefect,
)
from al_pipeline.servers.process import Progress, Server

__all__ = [
    "Account",
    "Invited",
    "Progress",
    "Server",
    "admin",
    "install",
    "invite",
    "label_studio_status",
    "password_file",
    "prefect_environment",
    "prefect_status",
    "start_label_studio",
    "start_prefect",
    "stop_label_studio",
    "stop_prefect",
]
