"""`tandem generate` and `tandem chat`: prompts to a running cluster, answers as they come."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from protos import tandem_pb2 as pb
from tandem.cli.common import (
    ConfigOption,
    JsonOption,
    TargetOption,
    as_dict,
    print_json,
    report_lines,
    stderr,
)
from tandem.cli.reach import connect
from tandem.client import Client, Prompt
from tandem.clock import now_s
from tandem.errors import DeadlineExceeded, InvalidRequest, TandemError

_INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended."""

MaxTokens = Annotated[int | None, typer.Option(min=1, help="Generate at most so many tokens. Default: the server's.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw among the k likeliest tokens; 0 is off.")]
TopP = Annotated[
    float, typer.Option(min=0, max=1, help="Draw among the likeliest tokens of this probability; 1 is off.")
]
Seed = Annotated[
    int | None, typer.Option(min=0, help="The same seed draws the same answer. Default: the server draws one.")
]


@dataclass(slots=True)
class Answer:
    """One streamed answer: the text of each sample, when its tokens came, and how it ended. `sent_s` is when it was asked for."""

    sent_s: float
    texts: dict[int, str] = field(default_factory=dict)
    times_s: list[float] = field(default_factory=list)
    """Seconds since `sent_s`, one per token of any sample."""
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    cut: list[int] = field(default_factory=list)
    """The samples that ended at their limit of tokens, not by themselves."""
    completed: pb.Completed | None = None

    @property
    def ttft_s(self) -> float:
        """Seconds from asking to the first token; NaN without any."""
        return self.times_s[0] if self.times_s else float("nan")

    @property
    def time_per_token_s(self) -> float | None:
        """Mean seconds between tokens; None for fewer than two."""
        return (self.times_s[-1] - self.times_s[0]) / (len(self.times_s) - 1) if len(self.times_s) > 1 else None


def stream(
    client: Client,
    prompt: Prompt,
    sampling: pb.SamplingParams,
    *,
    echo: bool = False,
    as_json: bool = False,
    timeout_s: float | None = None,
) -> Answer:
    """Sends one request and collects its answer; `echo` writes the first sample's text to stdout as it comes, `as_json`
    each event as a line. Raises the TandemError that ended the request, also when the stream lacks its terminal message;
    what was echoed before it ends with a newline."""
    answer = Answer(now_s())
    try:
        for event in client.generate(prompt, sampling, timeout_s=timeout_s):
            if as_json:
                print_json(as_dict(event))
            if event.HasField("chunk"):
                _take(answer, event.chunk, echo)
            elif event.HasField("completed"):
                answer.completed = event.completed
        if answer.completed is None:
            raise TandemError("the stream ended without its terminal message")
    except TandemError:
        if echo and answer.texts.get(0):
            print(flush=True)
        raise
    return answer


def _take(answer: Answer, chunk: pb.Chunk, echo: bool) -> None:
    answer.times_s.extend([now_s() - answer.sent_s] * len(chunk.token_ids))
    answer.token_ids.setdefault(chunk.index, []).extend(chunk.token_ids)
    answer.texts[chunk.index] = answer.texts.get(chunk.index, "") + chunk.text
    if chunk.finish_reason == "length":
        answer.cut.append(chunk.index)
    if echo and chunk.index == 0:
        sys.stdout.write(chunk.text)
        sys.stdout.flush()


def check_prompt(prompt: str) -> None:
    """Raises InvalidRequest if there is nothing to answer."""
    if not prompt:
        raise InvalidRequest("the prompt is empty")


def explained(error: TandemError, *, raw: bool, waited_s: float, timeout_s: float | None) -> TandemError:
    """`error` in the words of the command's options, where one of them has to do with it."""
    # The server may see the client's deadline a little before the client does.
    if isinstance(error, DeadlineExceeded) and timeout_s is not None and waited_s > 0.9 * timeout_s:
        return DeadlineExceeded(f"gave up after {timeout_s:g} s (--timeout-s)")
    if isinstance(error, InvalidRequest) and not raw and "chat template" in str(error):
        return InvalidRequest(f"{error}; use --raw")
    return error


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    config_path: ConfigOption = None,
    target: TargetOption = "",
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    system: Annotated[str, typer.Option(help="A system message before the prompt.")] = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: Annotated[
        float, typer.Option(min=0, max=1, help="Drop tokens less likely than this share of the best; 0 is off.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.01, help="1 is off.")] = 1.0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, help="Parallel answers that share the prompt's KV.")
    ] = 1,
    logprobs: Annotated[
        int | None, typer.Option(min=0, help="With --json: log-probabilities, and so many alternatives.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="A file with a JSON Schema that the answer must match.", dir_okay=False)
    ] = None,
    regex: Annotated[str, typer.Option(help="A regular expression that the answer must match as a whole.")] = "",
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of the answer.")] = False,
    timeout_s: Annotated[float | None, typer.Option(min=0.001, help="Give up after so many seconds.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Say on stderr where it ran and what it reused.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Send one prompt and stream the answer."""
    text = sys.stdin.read() if prompt == "-" else prompt
    check_prompt(text)
    if raw and system:
        raise InvalidRequest("--system needs the chat template; it can't be used with --raw")
    sampling = pb.SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or [],
        n=samples,
        num_logprobs=logprobs,
        ignore_eos=ignore_eos,
        grammar=_grammar(json_schema, regex),
    )
    whole: Prompt = text if raw else [*([("system", system)] if system else []), ("user", text)]
    with connect(target, config_path) as client:
        began_s = now_s()
        try:
            answer = stream(
                client, whole, sampling, echo=samples == 1 and not as_json, as_json=as_json, timeout_s=timeout_s
            )
        except KeyboardInterrupt:
            print()
            raise typer.Exit(_INTERRUPTED) from None
        except TandemError as error:
            told = explained(error, raw=raw, waited_s=now_s() - began_s, timeout_s=timeout_s)
            if as_json:
                print_json({"error": {"code": told.code, "message": str(told)}})
            raise told from error
    if not as_json:
        if samples > 1:
            for index in sorted(answer.texts):
                print(f"--- {index}\n{answer.texts[index]}")
        else:
            print()
        say_cut(answer)
    if report:
        print_report(answer)


def _grammar(json_schema: Path | None, regex: str) -> pb.Grammar | None:
    """Raises InvalidRequest if both are given, or the file can't be read."""
    if json_schema is None:
        return pb.Grammar(regex=regex) if regex else None
    if regex:
        raise InvalidRequest("--json-schema and --regex are given, an answer is held to one of them")
    try:
        return pb.Grammar(json_schema=json_schema.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--json-schema: {json_schema} can't be read: {error}") from error


def chat(
    config_path: ConfigOption = None,
    target: TargetOption = "",
    system: Annotated[str, typer.Option(help="A system message before the conversation.")] = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    seed: Seed = None,
    report: Annotated[
        bool, typer.Option("--report", help="Say after each answer where it ran and what it reused.")
    ] = False,
) -> None:
    """Talk with the model; each turn reuses the KV of those before. Ctrl-C ends an answer, Ctrl-D the conversation."""
    sampling = pb.SamplingParams(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    messages: list[tuple[str, str]] = [("system", system)] if system else []
    prompt = "> " if sys.stdin.isatty() else ""
    with connect(target, config_path) as client:
        client.cluster()  # a wrong address is said before the first question
        try:
            while True:
                try:
                    question = input(prompt)
                except KeyboardInterrupt:
                    if not prompt:  # nobody types: the signal means the end
                        raise
                    print("\nCtrl-D ends the conversation")
                    continue
                if question.strip():
                    _turn(client, messages, question, sampling, report)
        except (EOFError, KeyboardInterrupt):
            print()


def _turn(
    client: Client, messages: list[tuple[str, str]], question: str, sampling: pb.SamplingParams, report: bool
) -> None:
    """Asks and appends question and answer to `messages`; Ctrl-C ends the answer and leaves `messages` as they were."""
    try:
        answer = stream(client, [*messages, ("user", question)], sampling, echo=True)
    except KeyboardInterrupt:
        print("\n(interrupted)")
        return
    print()
    say_cut(answer)
    messages += [("user", question), ("assistant", answer.texts.get(0, ""))]
    if report:
        print_report(answer)


def say_cut(answer: Answer) -> None:
    """Says on stderr which samples ended at their limit, and at how many tokens."""
    for index in sorted(answer.cut):
        which = f"sample {index} " if len(answer.texts) > 1 else ""
        note = f"({which}cut at {len(answer.token_ids[index])} tokens)"
        stderr.print(note, style="dim", highlight=False, markup=False)


def print_report(answer: Answer) -> None:
    """Says on stderr where an answer came from."""
    if answer.completed is not None:
        for line in report_lines(answer.completed, answer.time_per_token_s):
            print(line, file=sys.stderr)
