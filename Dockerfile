# syntax=docker/dockerfile:1
# Two stages: the wheel is built and installed in the first, the second holds only what runs.
# With another registry or index: --build-arg PYTHON=… and pip's own configuration.
ARG PYTHON=python:3.12-slim

FROM ${PYTHON} AS build
WORKDIR /src
RUN python -m venv /opt/sidecar-daemon
# EXTRAS: "export" lets the container build ONNX files with "models pull"; empty leaves that to another machine.
ARG EXTRAS=export
COPY pyproject.toml README.md LICENSE ./
COPY sidecar_daemon ./sidecar_daemon
COPY sql ./sql
COPY models ./models
ENV PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1
RUN --mount=type=cache,target=/var/cache/pip \
    /opt/sidecar-daemon/bin/pip install ".${EXTRAS:+[$EXTRAS]}"

FROM ${PYTHON}
LABEL org.opencontainers.image.title="sidecar-daemon" org.opencontainers.image.licenses="MIT"
RUN groupadd --system --gid 10001 sidecar \
    && useradd --system --uid 10001 --gid sidecar --home-dir /var/lib/sidecar --create-home sidecar \
    && install --directory --owner sidecar --group sidecar /models
COPY --from=build /opt/sidecar-daemon /opt/sidecar-daemon
# In a container the port must be reachable from outside of it; publish it as narrowly as you can.
ENV PATH=/opt/sidecar-daemon/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    SIDECAR_MODELS_DIR=/models \
    SIDECAR_LOG_FORMAT=json \
    SIDECAR_HTTP_HOST=0.0.0.0 \
    SIDECAR_HTTP_PORT=8088
WORKDIR /var/lib/sidecar
VOLUME /models
EXPOSE 8088
USER 10001:10001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['SIDECAR_HTTP_PORT']), timeout=2); c.request('GET', '/livez'); sys.exit(c.getresponse().status != 200)"]
CMD ["python", "-m", "sidecar_daemon"]
