# The image of steps without a GPU, and of the MLflow server.
#
#   docker build -f infra/docker/cpu.Dockerfile -t REGISTRY/matvlm:cpu-VERSION .
#
# With --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's index of CPU builds> torch comes without gigabytes of CUDA libraries.
FROM python:3.11.13-slim-bookworm AS build
ARG PIP_EXTRA_INDEX_URL
RUN python -m venv /opt/matvlm
ENV PATH=/opt/matvlm/bin:$PATH
WORKDIR /build
COPY requirements.txt ./
RUN sed '/^# checking and testing/,$d' requirements.txt > runtime.txt \
    && pip install --no-cache-dir --requirement runtime.txt
COPY pyproject.toml README.md ./
COPY matvlm matvlm
RUN pip install --no-cache-dir --no-build-isolation --no-deps .

FROM python:3.11.13-slim-bookworm
COPY --from=build /opt/matvlm /opt/matvlm
# Numbers, because Kubernetes cannot tell from a name that it is not root. Metaflow unpacks a task's code where it starts.
RUN install --directory --owner 10001 --group 10001 /work
USER 10001:10001
WORKDIR /work
# A task is started as `python`. Metaflow would pip install its few needs at each start; they are in the image.
ENV PATH=/opt/matvlm/bin:$PATH \
    HOME=/work \
    PYTHONUNBUFFERED=1 \
    METAFLOW_SKIP_INSTALL_DEPENDENCIES=1
