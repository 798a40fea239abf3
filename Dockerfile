# syntax=docker/dockerfile:1
# For CPUs:          docker build -t lit-nn .
# For NVIDIA GPUs:   docker build -t lit-nn --build-arg TORCH_BACKEND=cu132 .
# Training:          mkdir -p runs && chmod a+rwx runs    # writable for the user in the container, number 1000
#                    docker run --rm -v "$PWD/runs:/project/runs" lit-nn python scripts/train.py --net resnet9
#                    with --gpus all --shm-size 2g for GPUs; --compile needs a C++ compiler, which is not in here

FROM python:3.13-slim AS base
ARG TORCH_BACKEND=cpu
ENV VENV=/opt/venv VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 \
    UV_TORCH_BACKEND=$TORCH_BACKEND UV_CACHE_DIR=/tmp/uv UV_LINK_MODE=copy
RUN pip install --no-cache-dir "uv>=0.9,<1" \
    && useradd --create-home --uid 1000 user \
    && install --directory --owner user --group user /opt/venv /project
WORKDIR /project
COPY --chown=user:user pyproject.toml constraints.txt ./

# What a developer needs besides, for .devcontainer, which has the working tree in place of a copy. Editors give the user
# the number that you have outside, so /opt/venv is open to all.
FROM base AS dev
# Debian keeps no older versions that could be named.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
USER 1000
RUN --mount=type=cache,target=/tmp/uv,uid=1000,gid=1000 \
    uv venv --seed --allow-existing /opt/venv \
    && uv pip install --requirement pyproject.toml --extra dev --extra docs --constraint constraints.txt \
    && chmod -R a+rwX /opt/venv

# What serving a model needs, without PyTorch: docs/serving.md
FROM base AS serve
USER 1000
RUN --mount=type=cache,target=/tmp/uv,uid=1000,gid=1000 \
    uv venv --allow-existing /opt/venv \
    && uv pip install httptools numpy onnxruntime pillow --constraint constraints.txt
COPY --chown=user:user . .
ENV PYTHONPATH=/project
EXPOSE 8000
ENTRYPOINT ["python", "scripts/serve.py", "/model.onnx", "--host", "0.0.0.0"]

# The packages, which change seldom, and then the project.
FROM base
USER 1000
RUN --mount=type=cache,target=/tmp/uv,uid=1000,gid=1000 \
    uv venv --seed --allow-existing /opt/venv \
    && uv pip install --requirement pyproject.toml --constraint constraints.txt
COPY --chown=user:user . .
RUN uv pip install --no-cache --no-deps --editable .
CMD ["python", "scripts/train.py"]
