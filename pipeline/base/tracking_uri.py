"""The address of the MLflow tracking store, and whether it can be used. Imports no MLflow, which takes seconds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sqlite3
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

from pipeline.base.errors import ConfigError

_PROBE_S = 7.0  # per address of a host, which may have two

_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}

_SQLITE = "sqlite:///"

_NOT_IN_SQLITE_URIS = re.compile(r"\?|%[0-9a-fA-F]{2}")  # the start of a query, and an escaped character


def tracking_uri() -> str:
    """Returns MLFLOW_TRACKING_URI, or the URI of a sqlite file in the working directory. Paths are absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}mlflow.db"
    if uri.startswith(_SQLITE) and uri != _SQLITE:
        path, question_mark, query = uri.removeprefix(_SQLITE).partition("?")
        return f"{_SQLITE}{Path(path).absolute()}{question_mark}{query}"  # workers have other working directories
    return uri


def check_tracking(experiment: str) -> None:
    """Checks that runs can be logged to an experiment, within 15 s. MLflow itself would retry for minutes.

    Raises: ConfigError for a URI that MLflow does not support, a server that does not answer, or an experiment that was
        deleted.
    """
    uri = tracking_uri()
    scheme = urlsplit(uri).scheme.partition("+")[0]  # without the driver of a database
    if scheme == "sqlite":
        deleted_id = _check_sqlite(uri, experiment)
    elif scheme in ("http", "https"):
        deleted_id = _check_server(uri, experiment)
    elif scheme in _PORTS:
        deleted_id = _check_database(uri, _PORTS[scheme])
    elif scheme in ("", "file") and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("true", "1"):
        raise ConfigError(
            f"MLFLOW_TRACKING_URI={uri}: MLflow no longer writes to folders; use sqlite:////path/of/mlflow.db or the "
            f"http:// address of a server, or unset it to use mlflow.db in this folder"
        )
    else:
        return
    if deleted_id is not None:
        raise ConfigError(deleted_experiment_message(experiment, deleted_id))


def deleted_experiment_message(experiment: str, experiment_id: str) -> str:
    """Returns what to do about an experiment that was deleted, for example in MLflow's UI."""
    return (
        f"the MLflow experiment {experiment!r} in {tracking_uri()} was deleted: restore it with "
        f"`MLFLOW_TRACKING_URI={tracking_uri()} mlflow experiments restore --experiment-id {experiment_id}`, or choose "
        f"another name as tracking.experiment in params.yaml"
    )


def _check_sqlite(uri: str, experiment: str) -> str | None:
    """Returns the id of the experiment if it was deleted."""
    if "MLFLOW_TRACKING_URI" not in os.environ and (match := _NOT_IN_SQLITE_URIS.search(str(Path.cwd()))):
        raise ConfigError(
            f"{Path.cwd()} has {match[0]} in its path, which the URI of a database cannot have: rename the folder, or "
            f"set MLFLOW_TRACKING_URI"
        )
    path = Path(uri.removeprefix(_SQLITE).partition("?")[0])
    if not uri.startswith(_SQLITE) or path.name in ("", ":memory:"):
        raise ConfigError(f"MLFLOW_TRACKING_URI={uri} names no file: use sqlite:////path/of/mlflow.db")
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not os.access(existing, os.W_OK) or (path == existing) != existing.is_file():
        raise ConfigError(f"{path} cannot be written: change that, or set MLFLOW_TRACKING_URI")
    if not path.is_file():
        return None
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=_PROBE_S)) as database,
    ):  # an empty or older database is MLflow's matter
        query = "SELECT experiment_id FROM experiments WHERE name = ? AND lifecycle_stage = 'deleted'"
        for (experiment_id,) in database.execute(query, (experiment,)):
            return str(experiment_id)
    return None


def _check_server(uri: str, experiment: str) -> str | None:
    query = urlencode({"experiment_name": experiment})
    try:
        with urllib.request.urlopen(
            f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name?{query}", timeout=_PROBE_S
        ) as response:
            found = json.load(response)["experiment"]
    except urllib.error.HTTPError as error:
        if error.code < 500:  # no such experiment yet, or credentials are needed, which MLflow's client has
            return None
        raise _no_answer(uri, f"status {error.code}") from None
    except (OSError, ValueError, KeyError) as error:  # ValueError: not a URL, or not JSON
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):  # MLflow's client has settings for certificates
            return None
        raise _no_answer(uri, reason) from None
    return found["experiment_id"] if found.get("lifecycle_stage") == "deleted" else None


def _check_database(uri: str, default_port: int) -> None:
    try:
        address = urlsplit(uri)
        with socket.create_connection((address.hostname or "localhost", address.port or default_port), _PROBE_S):
            pass
    except (OSError, ValueError) as error:
        raise _no_answer(re.sub(r"//[^@/]*@", "//", uri), error) from None


def _no_answer(uri: str, reason: object) -> ConfigError:
    return ConfigError(
        f"MLFLOW_TRACKING_URI={uri} does not answer ({reason}): start that server, or unset it to use mlflow.db in "
        f"this folder"
    )
