"""The HTTP endpoints: is it alive, is it ready, what has it counted, how far are the pipelines."""

from sidecar_daemon.adapters.http.application import HttpState, build_app
from sidecar_daemon.adapters.http.server import serve

__all__ = ["HttpState", "build_app", "serve"]
