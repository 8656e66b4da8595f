# Three images, each with what its room needs and no more:
#
#   docker build --target serve -t memoir-serve .     ranks over HTTP on port 8000
#   docker build --target jobs  -t memoir-jobs .      feature_repo apply, Beam jobs, refresh
#   docker build --target train -t memoir-train .     trains, evaluates, exports
#
# For an NVIDIA GPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130, and a run with --gpus all.
# Tables and bundles lie in MEMOIR_HOME, a volume at /srv/memoir; everything else may be mounted read-only.
ARG PYTHON=docker.io/library/python:3.11-slim-bookworm

FROM ${PYTHON} AS wheel
WORKDIR /src
RUN python -m venv /opt/build
COPY deploy/docker/build.lock ./
RUN /opt/build/bin/pip install --no-cache-dir --no-deps --require-hashes -r build.lock
COPY pyproject.toml README.md LICENSE ./
COPY feature_repo feature_repo
COPY beam_jobs beam_jobs
COPY modeling modeling
COPY serving serving
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheel .

FROM ${PYTHON} AS torch
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/memoir/bin:$PATH
RUN python -m venv /opt/memoir
COPY deploy/docker/torch.lock /tmp/
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --no-deps --require-hashes -r /tmp/torch.lock \
  && pip install --no-cache-dir --extra-index-url "${TORCH_INDEX}" "${TORCH}"

FROM torch AS serve-packages
COPY deploy/docker/serve.lock /tmp/
RUN pip install --no-cache-dir --no-deps --require-hashes -r /tmp/serve.lock
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir --no-deps /wheel/*.whl && pip check

FROM torch AS jobs-packages
COPY deploy/docker/jobs.lock /tmp/
RUN pip install --no-cache-dir --no-deps --require-hashes -r /tmp/jobs.lock
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir --no-deps /wheel/*.whl && pip check

FROM torch AS train-packages
COPY deploy/docker/train.lock /tmp/
RUN pip install --no-cache-dir --no-deps --require-hashes -r /tmp/train.lock
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir --no-deps /wheel/*.whl && pip check

# An account that may write nothing but the home; LightGBM wants libgomp1.
FROM ${PYTHON} AS account
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install -y --no-install-recommends libgomp1 \
  && rm -rf /var/lib/apt/lists/* \
  && useradd --system --uid 10001 --no-create-home --home-dir /nonexistent memoir \
  && install --directory --owner=memoir /srv/memoir
ENV PATH=/opt/memoir/bin:$PATH \
  MEMOIR_HOME=/srv/memoir \
  MPLCONFIGDIR=/tmp \
  PYTHONDONTWRITEBYTECODE=1 \
  PYTHONUNBUFFERED=1
WORKDIR /srv/memoir
USER 10001

FROM account AS jobs
COPY --from=jobs-packages /opt/memoir /opt/memoir
ENTRYPOINT ["memoir"]
CMD ["jobs", "refresh"]

FROM account AS train
COPY --from=train-packages /opt/memoir /opt/memoir
ENTRYPOINT ["memoir"]
CMD ["models", "--help"]

# Last, so that it is what a build without a target makes.
FROM account AS serve
COPY --from=serve-packages /opt/memoir /opt/memoir
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=120s --interval=5s --timeout=2s \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/livez', timeout=1)"]
ENTRYPOINT ["memoir", "serve"]
CMD ["--host", "0.0.0.0", "--port", "8000"]
