"""Grammars are tried in a process of their own before a request is taken: what compiling one takes has no bound in llguidance.

Owns that process' limits and the verdicts that are kept. A grammar that passes can be compiled anywhere: it takes the same work.
Whoever asks needs neither llguidance nor a vocabulary for masks: the trial's has single bytes, and the model's marks.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections import OrderedDict

from protos.control import Grammar
from tandem.errors import InvalidRequest, Overloaded
from tandem.grammar import trial_process
from tandem.tokenizer.tokenizer import Tokenizer

MAX_VERDICTS = 1024
WAIT_S = 20.0
"""A trial that has not had its time of the processor after so long is asked for again: the machine is busy."""


class Trials:
    """Verdicts on grammars for one model. For one thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._marks: dict[int, str] | None = None
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()
        """The reason of each refusal; empty where there is none."""

    def check(self, grammar: Grammar) -> None:
        """Raises InvalidRequest with the reason if no answer can be held to it, and Overloaded if the machine is too busy to say.
        Takes some 0.2 s for one that is not known yet."""
        digest = hashlib.sha256(f"{grammar.kind}\0{grammar.text}".encode()).digest()
        verdict = self._verdicts.get(digest)
        if verdict is None:
            verdict = self._verdicts[digest] = self._try(grammar)
            if len(self._verdicts) > MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        else:
            self._verdicts.move_to_end(digest)
        if verdict:
            raise InvalidRequest(f"the {grammar.kind} can't be used: {verdict}", "grammar")

    def _try(self, grammar: Grammar) -> str:
        tokenizer = self._tokenizer
        if not tokenizer.eos_token_ids:
            raise InvalidRequest(
                "the model has no end-of-sequence token, by which an answer that matches a grammar ends"
            )
        if self._marks is None:
            self._marks = {
                token_id: tokenizer.token_bytes(token_id, skip_special=False).decode("utf-8", "replace")
                for token_id in range(tokenizer.vocab_size)
                if tokenizer.is_special(token_id)
            }
        asked = trial_process.Asked(
            kind=grammar.kind,
            text=grammar.text,
            vocab_size=tokenizer.vocab_size,
            marks=list(self._marks.items()),
            eos_token_ids=sorted(tokenizer.eos_token_ids),
        )
        try:
            done = subprocess.run(
                [sys.executable, "-m", trial_process.__name__],
                input=json.dumps(asked),
                capture_output=True,
                text=True,
                timeout=WAIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Overloaded(f"a grammar could not be tried within {WAIT_S:g} s") from error
        if done.returncode == 0:
            verdict: str = json.loads(done.stdout)
            return verdict
        if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            return f"compiling it takes more than {trial_process.CPU_S} s"
        return f"compiling it takes more than {trial_process.MAX_BYTES // 2**20} MiB, or breaks llguidance"
