# The load test alone, without torch or a model:
#   docker build -f docker/loadtest.Dockerfile -t mpm-segmenter-loadtest .
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS environment
ARG PIP_NO_CACHE_DIR=1
COPY constraints.txt /tmp/
RUN python3 -m venv /opt/mpm \
    && /opt/mpm/bin/pip install --disable-pip-version-check --no-compile -c /tmp/constraints.txt \
        locust numpy opencv-python-headless pillow prometheus-client pyyaml "tritonclient[grpc]"
WORKDIR /opt/mpm/app
COPY loadtest loadtest
COPY model_store/__init__.py model_store/
COPY model_store/demo/*.py model_store/demo/

FROM ${BASE_IMAGE}
RUN groupadd --gid 10001 mpm \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /tmp --shell /usr/sbin/nologin mpm
ENV PATH=/opt/mpm/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH=/opt/mpm/app \
    PYTHONUNBUFFERED=1
COPY --from=environment /opt/mpm /opt/mpm
WORKDIR /opt/mpm/app
USER 10001:10001
ENTRYPOINT ["python", "-m", "loadtest"]
LABEL org.opencontainers.image.title="mpm-segmenter-loadtest" \
      org.opencontainers.image.description="Load tests of Segmenter with Mutual Pair Merging"
