# Every role for machines with GPUs and RDMA, as user 10001: torch's CUDA build, and the distribution's UCX, which has RDMA where
# the wheel's has none. The driver's libraries come from the container runtime.
#   docker build -f deploy/docker/gpu.Dockerfile -t tandem:0.1.0-gpu .
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
RUN python -m venv /opt/tandem \
    && /opt/tandem/bin/python -m pip install --no-cache-dir --disable-pip-version-check -c constraints.txt . \
    && cd / \
    && /opt/tandem/bin/python -c "import kvpool._chain_keys, router._block_map, router._weigh" \
    && /opt/tandem/bin/python -c "from kernels.cpu import native; assert native()"

# A distribution whose UCX the binding accepts; the last line of its RUN fails the build where it is too old.
FROM ubuntu:26.04
COPY --from=build /usr/local /usr/local
COPY --from=build /opt/tandem /opt/tandem
ENV PATH=/opt/tandem/bin:/usr/local/bin:/usr/bin:/bin \
    LD_LIBRARY_PATH=/usr/local/lib \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TANDEM_CACHE=/cache
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates ibverbs-providers libffi8 libsqlite3-0 libssl3t64 libstdc++6 libucx-dev libucx0 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 tandem \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin tandem \
    && ldconfig \
    && python -c "import ctypes, sqlite3, ssl" \
    && python -c "from kvpool.transport import ucx_library as ucx; assert ucx.system_version()[:2] >= ucx.MIN_VERSION"
USER 10001:10001
EXPOSE 8050 8051 8052 8053
CMD ["tandem", "--help"]
