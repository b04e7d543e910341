# Tuneyard for machines without GPUs: `docker build -f docker/cpu.Dockerfile -t tuneyard:0.1.0-cpu .` in the checkout.
# One image is driver, Ray head and Ray worker; what it does is the command it is given.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# An index with torch's CPU builds saves several GB of CUDA libraries that this image cannot use.
ARG TORCH_INDEX_URL=
ARG TORCH_VERSION=2.13.0
RUN pip install ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} "torch==${TORCH_VERSION}"

# The dependencies before the sources: an edit of the code rebuilds the last, small layer alone.
WORKDIR /src
COPY pyproject.toml ./
RUN python -c 'import tomllib as t; print(*t.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
    > requirements.txt \
    && pip install --requirement requirements.txt
COPY README.md LICENSE ./
COPY trainers trainers
COPY orchestrator orchestrator
COPY ds_configs ds_configs
RUN pip install --no-deps .

FROM ${PYTHON_IMAGE}
# tini reaps and passes signals on; procps and wget are what KubeRay's hooks and probes call.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini procps wget iproute2 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --user-group --create-home --shell /bin/bash tuneyard
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 DS_ACCELERATOR=cpu RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
WORKDIR /home/tuneyard
ENTRYPOINT ["tini", "--"]
CMD ["tuneyard", "--help"]
