# syntax=docker/dockerfile:1
# Three stages: `build` installs the wheel, `model` pulls a model where one is asked for, the last holds what runs.
#   docker build -t sidecar-daemon .                                a model is mounted at /models
#   docker build -t sidecar-daemon --build-arg MODEL=gte-small .    the model is part of the image
# The container needs no writable root: docker run --read-only --tmpfs /tmp --cap-drop ALL …
# With another registry or index: --build-arg PYTHON=… and pip's own configuration.
ARG PYTHON=python:3.12-slim-bookworm

FROM ${PYTHON} AS build
# "export" lets the container pull models by itself; empty leaves that to another machine, or to MODEL.
# "export,openvino" adds a second runtime, for processors that multiply bf16.
ARG EXTRAS=export
ENV PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY sidecar_daemon ./sidecar_daemon
COPY sql ./sql
COPY models ./models
RUN --mount=type=cache,target=/var/cache/pip \
    python -m venv /opt/sidecar-daemon \
    && /opt/sidecar-daemon/bin/pip install ".${EXTRAS:+[$EXTRAS]}"

FROM build AS model
ARG MODEL=
RUN --mount=type=cache,target=/var/cache/pip \
    mkdir /models \
    && if [ -n "$MODEL" ]; then \
         /opt/sidecar-daemon/bin/pip install ".[export]" \
         && SIDECAR_MODELS_DIR=/models /opt/sidecar-daemon/bin/sidecar-daemon models pull "$MODEL"; \
       fi

FROM ${PYTHON}
LABEL org.opencontainers.image.title="sidecar-daemon" org.opencontainers.image.licenses="MIT"
RUN groupadd --system --gid 10001 sidecar \
    && useradd --system --uid 10001 --gid sidecar --home-dir /var/lib/sidecar --create-home sidecar
COPY --from=build /opt/sidecar-daemon /opt/sidecar-daemon
COPY --from=model --chown=10001:10001 /models /models
# In a container the port must be reachable from outside of it; publish it as narrowly as you can.
# Nothing is written but, by `models pull`, to /models and to what the cache folder names.
ENV PATH=/opt/sidecar-daemon/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/tmp \
    SIDECAR_MODELS_DIR=/models \
    SIDECAR_LOG_FORMAT=json \
    SIDECAR_HTTP_HOST=0.0.0.0 \
    SIDECAR_HTTP_PORT=8088
WORKDIR /var/lib/sidecar
EXPOSE 8088
USER 10001:10001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['SIDECAR_HTTP_PORT']), timeout=2); c.request('GET', '/livez'); sys.exit(c.getresponse().status != 200)"]
CMD ["python", "-m", "sidecar_daemon"]
