# Every role on CPUs, as user 10001; nothing in it is written to but /cache, /run/tandem and /tmp, which are mounted.
#   docker build -f deploy/docker/cpu.Dockerfile -t tandem:0.1.0-cpu .
# A CPU build of torch saves some gigabytes: --build-arg PIP_EXTRA_INDEX_URL=… names an index that has one.
FROM python:3.11.14-slim-trixie AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt pyproject.toml setup.py README.md ./
COPY decode_worker decode_worker
COPY kernels kernels
COPY kvpool kvpool
COPY prefill_worker prefill_worker
COPY protos protos
COPY router router
COPY tandem tandem
ARG PIP_EXTRA_INDEX_URL=""
RUN python -m venv /opt/tandem \
    && /opt/tandem/bin/python -m pip install --no-cache-dir --disable-pip-version-check -c constraints.txt . \
    && cd / \
    && /opt/tandem/bin/python -c "import kvpool._chain_keys, router._block_map, router._weigh" \
    && /opt/tandem/bin/python -c "from kernels.cpu import native; assert native()"

FROM python:3.11.14-slim-trixie
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libstdc++6 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 tandem \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin tandem
COPY --from=build /opt/tandem /opt/tandem
ENV PATH=/opt/tandem/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TANDEM_CACHE=/cache
USER 10001:10001
EXPOSE 8050 8051 8052 8053
CMD ["tandem", "--help"]
