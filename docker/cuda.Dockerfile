# Tuneyard for NVIDIA GPUs: `docker build -f docker/cuda.Dockerfile -t tuneyard:0.1.0-cuda .` in the checkout.
# One image is driver, Ray head and Ray worker; what it does is the command it is given.
#
# The "devel" base has nvcc, with which DeepSpeed compiles its fused and CPU-offload optimizers at first use. Its major
# version has to be the one that torch was built with (13 for torch 2.13 from the Python package index).
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04

FROM ${CUDA_IMAGE}
# gcc, g++, ninja and libaio: DeepSpeed's kernels, NVMe offload. ibverbs: NCCL over InfiniBand. tini reaps and passes
# signals on; procps and wget are what KubeRay's hooks and probes call.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
    python3 python3-dev python3-venv gcc g++ ninja-build libaio-dev libibverbs1 ibverbs-providers \
    tini procps wget iproute2 \
    && rm -rf /var/lib/apt/lists/* \
    && { userdel --remove ubuntu 2>/dev/null || true; } \
    && useradd --uid 1000 --user-group --create-home --shell /bin/bash tuneyard \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# An index with builds for another CUDA version, where the driver is too old for the default one.
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

ENV PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
WORKDIR /home/tuneyard
ENTRYPOINT ["tini", "--"]
CMD ["tuneyard", "--help"]
