# Wattbridge as an image: docker build -t wattbridge .
# Both stages take the same Python: the second one runs what the first one has made for it.
ARG PYTHON_IMAGE=python:3.13.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# Dependencies change less often than the code: a step of their own, which is done again only with them. No compiler is
# needed, and none is there: every dependency comes as a wheel, and only with the hash that is written down.
COPY requirements/run.txt requirements/build.txt requirements/
RUN python -m venv --without-pip /opt/wattbridge \
 && pip --python /opt/wattbridge/bin/python install --require-hashes --only-binary=:all: -r requirements/run.txt \
 && pip install --require-hashes --only-binary=:all: -r requirements/build.txt
COPY . .
RUN pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
 && pip --python /opt/wattbridge/bin/python install --no-deps --no-index dist/*.whl

FROM ${PYTHON_IMAGE}
# --build-arg VERSION=…: what `wattbridge --version` says.
ARG VERSION=unknown
LABEL org.opencontainers.image.title="Wattbridge" \
      org.opencontainers.image.description="MQTT-to-PostgreSQL bridge for energy telemetry: acknowledge after commit" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}"
# A number that is no user of any host, so that whoever breaks out is nobody there.
RUN groupadd --gid 10001 wattbridge \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir / --shell /usr/sbin/nologin wattbridge
COPY --from=build /opt/wattbridge /opt/wattbridge
# The bytecode came with the installation, and the root file system may be read-only.
ENV PATH=/opt/wattbridge/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    WATTBRIDGE_HEALTH__LISTEN=0.0.0.0:9464
USER 10001:10001
WORKDIR /
EXPOSE 9464 9465
STOPSIGNAL SIGTERM
# Alive, not ready: some orchestrators kill what is unhealthy, and a bridge that waits for its database must not be killed.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s CMD ["python", "-IS", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 9464, timeout=4); c.request('GET', '/livez'); r = c.getresponse(); print(r.read().decode()); raise SystemExit(r.status != 200)"]
ENTRYPOINT ["wattbridge"]
CMD ["run"]
