# The image of steps on NVIDIA GPUs: A100 and its kin (sm_80) and H100, H200 (sm_90).
#
#   docker build -f infra/docker/gpu.Dockerfile -t REGISTRY/matvlm:gpu-VERSION .
#
# The first stage compiles causal-conv1d and mamba-ssm with nvcc, for minutes, because no prebuilt kernels exist for this
# torch; its CUDA must be of the major version of the torch build that pip installs. The second has no compiler of CUDA:
# torch brings the libraries, the node the driver.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/matvlm
ENV PATH=/opt/matvlm/bin:$PATH
WORKDIR /build
COPY requirements.txt requirements-gpu.txt ./
RUN sed '/^# checking and testing/,$d' requirements.txt > runtime.txt \
    && pip install --no-cache-dir --requirement runtime.txt
# Both packages list nine architectures in their setup.py and take no list from outside: all but two are struck out.
# FORCE_BUILD keeps them from looking for a prebuilt wheel on the network.
ENV CUDA_HOME=/usr/local/cuda MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE MAX_JOBS=4
RUN grep --invert-match --extended-regexp '^(#|mamba-ssm|causal-conv1d)' requirements-gpu.txt > small.txt \
    && grep --extended-regexp '^(mamba-ssm|causal-conv1d)' requirements-gpu.txt > kernels.txt \
    && pip install --no-cache-dir --no-deps --requirement small.txt \
    && pip download --no-cache-dir --no-binary :all: --no-build-isolation --no-deps --requirement kernels.txt \
    && for archive in ./*.tar.gz; do tar --extract --file "$archive"; done \
    && sed --in-place --regexp-extended '/append\("-gencode"\)/{N;/sm_(80|90)"/!s/^( *).*$/\1pass/}' ./*/setup.py \
    && test "$(grep --extended-regexp --only-matching 'sm_[0-9]+' ./*/setup.py | wc --lines)" = 4 \
    && pip install --no-cache-dir --no-build-isolation --no-deps ./causal_conv1d-*/ ./mamba_ssm-*/
COPY pyproject.toml README.md ./
COPY matvlm matvlm
RUN pip install --no-cache-dir --no-build-isolation --no-deps . \
    && DS_ACCELERATOR=cuda python -c 'import causal_conv1d, deepspeed, mamba_ssm'

FROM ubuntu:24.04
# Triton and torch.compile build small host programs while a model runs: they need a C compiler and Python's headers.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev gcc g++ \
    && rm -rf /var/lib/apt/lists/* \
    && install --directory --owner 10001 --group 10001 /work
COPY --from=build /opt/matvlm /opt/matvlm
# Numbers, because Kubernetes cannot tell from a name that it is not root. Metaflow unpacks a task's code where it starts.
USER 10001:10001
WORKDIR /work
# A task is started as `python`. Metaflow would pip install its few needs at each start; they are in the image.
ENV PATH=/opt/matvlm/bin:$PATH \
    HOME=/work \
    PYTHONUNBUFFERED=1 \
    METAFLOW_SKIP_INSTALL_DEPENDENCIES=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
