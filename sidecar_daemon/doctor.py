"""``doctor``: looks at everything that the daemon stands on, and says how to mend what is wrong."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sidecar_daemon.adapters.postgres.indexing import PipelineIndex
from sidecar_daemon.adapters.postgres.inspection import Inspection, notification_arrives
from sidecar_daemon.adapters.postgres.migrate import check_version, expected_version
from sidecar_daemon.adapters.postgres.operations import PostgresOperations
from sidecar_daemon.app.model_files import check_model_id, known_manifests, model_file
from sidecar_daemon.app.operations import opened_database
from sidecar_daemon.app.runtimes import choose_runtime, this_machine
from sidecar_daemon.domain.errors import Fatal, SidecarError
from sidecar_daemon.domain.indexing import IndexState
from sidecar_daemon.settings import installed_folder, usable_cores

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable

    from sidecar_daemon.adapters.postgres.pool import Database
    from sidecar_daemon.domain.messages import Pipeline
    from sidecar_daemon.settings import Settings

_OLDEST_SERVER = 140000
_OLDEST_VECTOR = (0, 7)
_LISTEN_SECONDS = 5.0


class State(StrEnum):
    """How one thing is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    found: str
    mend: str | None = None
    """What to do about it."""


async def examine(settings: Settings) -> list[Check]:
    """Look at everything, also after something failed. Never raises for what it finds."""
    checks = _machine(settings)
    try:
        async with opened_database(settings) as database:
            checks += await _database(settings, database)
    except SidecarError as error:
        checks.append(_failed("database", error, "check SIDECAR_DATABASE_URL, and that the server runs"))
    return checks


def _machine(settings: Settings) -> list[Check]:
    cores, threads = usable_cores(), settings.model.threads
    busy = threads > cores
    return [
        Check("settings", State.OK, "read and valid"),
        Check(
            "threads",
            State.WARN if busy else State.OK,
            f"{threads} inference threads on {cores} usable cores",
            f"set SIDECAR_THREADS to {cores} or less: more threads than cores only wait" if busy else None,
        ),
        _runtime(settings),
        *_models(settings),
    ]


def _runtime(settings: Settings) -> Check:
    try:
        choice = choose_runtime(settings.model.runtime, this_machine())
    except Fatal as error:
        return _failed("runtime", error, "set SIDECAR_RUNTIME to auto, or give OpenVINO what it lacks")
    return Check("runtime", State.OK, f"{choice}: {choice.reason}")


def _models(settings: Settings) -> list[Check]:
    try:
        files = [model_file(settings, manifest) for manifest in known_manifests(settings).values()]
    except Fatal as error:
        return [_failed("models", error, "mend or remove that manifest")]
    here = [file for file in files if file.state != "model_missing"]
    found = [
        Check(f"model {file.name}", State.OK, f"verified in {file.detail}")
        if file.state == "pulled"
        else Check(f"model {file.name}", State.FAIL, file.detail, f"sidecar-daemon models pull {file.name}")
        for file in here
    ]
    if not here:
        found.append(
            Check(
                "models", State.WARN, f"none is pulled in {settings.model.dir}", "sidecar-daemon models pull gte-small"
            )
        )
    if find_spec("onnx") is None or find_spec("safetensors") is None:
        extra = "pip install 'sidecar-daemon[export]' where models are pulled"
        found.append(Check("export", State.WARN, "models cannot be made ready here: the extra is missing", extra))
    return found


async def _database(settings: Settings, database: Database) -> list[Check]:
    inspection = Inspection(database)
    server = await inspection.server()  # ends the examination of an unreachable database
    old = server.number < _OLDEST_SERVER
    checks = [
        Check("database", State.OK, f"{database.place} answers, as role {server.role}"),
        Check(
            "server",
            State.FAIL if old else State.OK,
            f"PostgreSQL {server.version}",
            "upgrade to PostgreSQL 14 or newer" if old else None,
        ),
    ]
    if server.standby:
        primary = "point SIDECAR_DATABASE_URL at the primary (target_session_attrs=read-write)"
        checks.append(Check("primary", State.FAIL, "this server is a standby, it only reads", primary))
    steps = (_vector(inspection), _pgmq(inspection), _schema(database), _grants(inspection, server.role))
    checks += [await _guarded(step) for step in (*steps, _listen(settings))]
    if all(check.state is not State.FAIL for check in checks if check.name in {"schema", "grants"}):
        checks += await _pipelines(settings, database)
    return checks


async def _guarded(step: Awaitable[Check]) -> Check:
    """A check whose own question fails is a failed check, not the end."""
    try:
        return await step
    except SidecarError as error:
        return _failed("database", error, "see the other lines")


async def _vector(inspection: Inspection) -> Check:
    found = await inspection.extension("vector")
    if found.installed is None:
        mend = "sidecar-daemon migrate" if found.available else "install pgvector 0.7 or newer on the server"
        return Check("vector", State.FAIL, "extension vector is not in this database", mend)
    if _numbers(found.installed) < _OLDEST_VECTOR:
        mend = "update pgvector on the server to 0.7 or newer, then ALTER EXTENSION vector UPDATE"
        return Check("vector", State.FAIL, f"extension vector {found.installed}", mend)
    return Check("vector", State.OK, f"extension vector {found.installed}")


async def _pgmq(inspection: Inspection) -> Check:
    if not await inspection.has_pgmq():
        return Check("pgmq", State.FAIL, "pgmq is not in this database", "sidecar-daemon migrate")
    version = (await inspection.extension("pgmq")).installed
    return Check("pgmq", State.OK, f"extension pgmq {version}" if version else "installed as plain SQL")


async def _schema(database: Database) -> Check:
    folder = installed_folder("sql")
    try:
        await check_version(database, folder)
    except Fatal as error:
        newer = error.code == "schema_too_new"
        mend = "install the newer release of sidecar-daemon" if newer else "sidecar-daemon migrate"
        return Check("schema", State.FAIL, str(error), mend)
    return Check("schema", State.OK, f"version {expected_version(folder)}, as this release needs")


async def _grants(inspection: Inspection, role: str) -> Check:
    forbidden = await inspection.forbidden_functions()
    if not forbidden:
        return Check("grants", State.OK, f"{role} may call what the daemon calls")
    some = ", ".join(forbidden[:3]) + (", …" if len(forbidden) > 3 else "")
    return Check(
        "grants",
        State.FAIL,
        f"{role} may not call sidecar.{some}",
        f'as the owner run: GRANT sidecar_runtime TO "{role}"',
    )


async def _listen(settings: Settings) -> Check:
    url = settings.database.notify_url()
    if url is None:
        mend = "set SIDECAR_LISTEN_URL to a direct URL, or accept polling every SIDECAR_POLL_MAX seconds at most"
        return Check("listen", State.WARN, "behind a transaction pooler: the daemon polls", mend)
    mend = "set SIDECAR_LISTEN_URL to a direct URL; behind a transaction pooler also SIDECAR_POOLER=transaction"
    try:
        heard = await notification_arrives(url, seconds=_LISTEN_SECONDS)
    except SidecarError as error:
        return _failed("listen", error, mend)
    if not heard:
        return Check("listen", State.WARN, "a notification did not arrive: edits wait for the next poll", mend)
    return Check("listen", State.OK, "notifications arrive at once")


async def _pipelines(settings: Settings, database: Database) -> list[Check]:
    try:
        pipelines = await PostgresOperations(database).pipelines()
    except SidecarError as error:
        return [_failed("pipelines", error, "see the other lines")]
    if not pipelines:
        return [Check("pipelines", State.WARN, "none is attached", "sidecar-daemon attach TABLE COLUMN...")]
    inspection = Inspection(database)
    checks = []
    for pipeline in pipelines:
        parts = await _guarded(_parts(inspection, pipeline))
        checks.append(parts)
        if parts.state is not State.FAIL:
            checks.append(await _guarded(_index(database, pipeline)))
        checks.append(await asyncio.to_thread(_pipeline_model, settings, pipeline))
    missing = sorted(set(settings.pipelines) - {pipeline.name for pipeline in pipelines})
    if missing:
        known = ", ".join(pipeline.name for pipeline in pipelines)
        mend = f"correct SIDECAR_PIPELINES; known pipelines: {known}"
        checks.append(Check("pipelines", State.FAIL, f"SIDECAR_PIPELINES names unknown {', '.join(missing)}", mend))
    return checks


async def _parts(inspection: Inspection, pipeline: Pipeline) -> Check:
    name = f"pipeline {pipeline.name}"
    parts = await inspection.parts(
        name=pipeline.name, source=pipeline.source, embeddings=pipeline.embeddings, queue=pipeline.queue
    )
    again = f"sidecar-daemon detach {pipeline.name}, then attach again"
    enable = (
        f"as the owner run: ALTER TABLE {pipeline.source} ENABLE TRIGGER ALL, then sidecar-daemon sweep {pipeline.name}"
    )
    faults = (
        (not parts.source, "its source table is gone", f"sidecar-daemon detach {pipeline.name}"),
        (not parts.embeddings, f"its table of vectors {pipeline.embeddings} is gone", again),
        (parts.queues < 3, f"{3 - parts.queues} of its three queues are gone", again),
        (parts.triggers < 2, f"a trigger on {pipeline.source} is gone: only sweeps notice edits", again),
        (parts.enabled < 2, f"a trigger on {pipeline.source} is disabled: only sweeps notice edits", enable),
    )
    for found, what, mend in faults:
        if found:
            return Check(name, State.FAIL, what, mend)
    if not pipeline.enabled:
        return Check(name, State.WARN, "paused", f"sidecar-daemon resume {pipeline.name}")
    return Check(name, State.OK, f"{pipeline.source} with vectors in {pipeline.embeddings}")


async def _index(database: Database, pipeline: Pipeline) -> Check:
    name = f"index of {pipeline.name}"
    index = await PipelineIndex(database, pipeline.name).status()
    build = f"sidecar-daemon index build {pipeline.name}"
    slow = "searches are exact and slow"
    match index.state:
        case IndexState.MISSING:
            return Check(name, State.FAIL, f"wanted, and not there: {slow}", build)
        case IndexState.INVALID:
            return Check(name, State.FAIL, "its build or drop was interrupted: it costs writes, serves nothing", build)
        case IndexState.DEFERRED if not index.backfilling:
            return Check(name, State.WARN, f"still deferred though the backfill is through: {slow}", build)
        case IndexState.DEFERRED:
            return Check(name, State.OK, f"deferred until the backfill is through: {slow}")
        case IndexState.NONE:
            return Check(name, State.OK, "none is wanted: searches are exact")
        case IndexState.LIVE | IndexState.BUILDING:
            return Check(name, State.OK, index.state.value)


def _pipeline_model(settings: Settings, pipeline: Pipeline) -> Check:
    name = f"model of {pipeline.name}"
    manifest = known_manifests(settings).get(pipeline.model)
    if manifest is None:
        mend = f"put {pipeline.model}.toml into {settings.model.dir}, or attach again with a known model"
        return Check(name, State.FAIL, f"model {pipeline.model} has no manifest here", mend)
    try:
        check_model_id(pipeline, manifest)
    except Fatal as error:
        return _failed(name, error, f"attach again with --model {pipeline.model}, or upgrade this installation")
    file = model_file(settings, manifest)
    if file.state != "pulled":
        return Check(name, State.FAIL, file.detail, f"sidecar-daemon models pull {pipeline.model}")
    return Check(name, State.OK, f"{pipeline.model_id or pipeline.model}, pulled and verified")


def _failed(name: str, error: SidecarError, mend: str) -> Check:
    return Check(name, State.FAIL, str(error), mend)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.partition("-")[0].split(".")[:2] if part.isdigit())


def healthy(checks: Iterable[Check]) -> bool:
    """Whether nothing failed."""
    return all(check.state is not State.FAIL for check in checks)
