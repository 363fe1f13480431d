"""vLLM's OpenAI server as a peer: prefix caching, token ids for prompts and answers, no tokenizer.

Runs in `.peers/vllm` (`make peers`), starts the server and ends it when stdin ends, which it does when the parent is gone,
however it went. Arguments that it doesn't know are the server's. Standard library alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading

BLOCK_SIZE = 32
"""Tokens that prefix caching shares at a time: the smallest that its CPU kernels take without loss (its default is 128)."""
MAX_SEQS = 64
END_S = 10.0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--port", required=True)
    parser.add_argument("--cpus", required=True, help="comma-separated; as many threads compute")
    parser.add_argument("--max-len", required=True)
    parser.add_argument("--kv-gib", required=True)
    options, more = parser.parse_known_args()
    os.sched_setaffinity(0, [int(cpu) for cpu in options.cpus.split(",")])
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "KMP_", "GOMP_"))}
    environment |= {
        "VLLM_CPU_OMP_THREADS_BIND": options.cpus,
        "VLLM_CPU_KVCACHE_SPACE": options.kv_gib,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", options.model, "--served-model-name", options.name,
        "--host", "127.0.0.1", "--port", options.port,
        "--dtype", "bfloat16", "--max-model-len", options.max_len, "--max-num-seqs", str(MAX_SEQS),
        "--block-size", str(BLOCK_SIZE), "--enable-prefix-caching", "--enable-prompt-tokens-details",
        "--skip-tokenizer-init", "--disable-uvicorn-access-log", *more,
    ]  # fmt: skip
    server = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    ending = threading.Event()
    ender = threading.Thread(target=end_with_parent, args=(server, ending), daemon=True)
    ender.start()
    code = server.wait()
    if ending.is_set():
        ender.join()
    return code


def end_with_parent(server: subprocess.Popen[bytes], ending: threading.Event) -> None:
    """Waits for the end of stdin, then ends the server and whatever it started, this process too."""
    while os.read(0, 4096):
        pass
    ending.set()
    server.terminate()
    try:
        server.wait(END_S)
    except subprocess.TimeoutExpired:
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
