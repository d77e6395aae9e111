# syntax=docker/dockerfile:1
# A server of pictures: `docker build --target cpu -t hart-infer .`, or `--target cuda`. compose.yaml runs it.

FROM python:3.12-slim-bookworm AS wheel
WORKDIR /source
COPY . .
ENV HART_INFER_BUILD_CUDA=0
RUN pip install --no-cache-dir -c constraints.txt build \
    && python -m build --wheel --outdir /dist

FROM python:3.12-slim-bookworm AS base
ENV HART_INFER_SERVE_HOST=0.0.0.0 \
    HF_HOME=/models \
    PYTHONUNBUFFERED=1 \
    TRITON_CACHE_DIR=/tmp/triton
RUN useradd --uid 10001 --no-create-home hart \
    && mkdir /models /pictures \
    && chown hart /models /pictures
WORKDIR /tmp
EXPOSE 8000
VOLUME ["/models"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
# Clients need keys: mount a file of them and name it in HART_INFER_SERVE_KEYS.
ENTRYPOINT ["hart-infer", "serve"]

FROM base AS cpu
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    --mount=type=bind,source=constraints.txt,target=/constraints.txt \
    pip install --no-cache-dir -c /constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu \
        "torch==$(sed -n 's/^torch==//p' /constraints.txt)+cpu" \
    && pip install --no-cache-dir -c /constraints.txt "$(ls /dist/*.whl)[serve,vila-u]"
USER 10001

FROM base AS cuda
# Triton compiles its kernels' launchers with a C compiler. On Linux, PyPI's torch brings CUDA.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    --mount=type=bind,source=constraints.txt,target=/constraints.txt \
    pip install --no-cache-dir -c /constraints.txt "$(ls /dist/*.whl)[serve,vila-u]"
USER 10001
