"""The committed chat is what its page says, and becomes prompts of which each turn's is the beginning of the next."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.bench.chat.workload import WORKLOAD, Scripts, Workload, load_workload
from tandem.errors import ConfigError
from tandem.tokenizer.tokenizer import Tokenizer
from tandem.tokenizer.vocabulary import Vocabulary

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


def bytes_tokenizer(template: str | None = CHATML) -> Tokenizer:
    """A token a byte."""
    return Tokenizer(
        Vocabulary(
            encode=lambda text: list(text.encode()),
            token_bytes=tuple(bytes([value]) for value in range(256)),
            special_ids=frozenset(),
            missing_bytes=b"",
            bos_token_id=None,
            eos_token_id=None,
            eos_token_ids=frozenset(),
            add_bos=False,
            chat_template=template,
        )
    )


@pytest.fixture(scope="module")
def workload() -> Workload:
    return load_workload(WORKLOAD)


def test_the_file_is_what_its_script_makes(tmp_path: Path) -> None:
    script = WORKLOAD.with_name("make_chat.py")
    folder = tmp_path / "workloads"
    folder.mkdir()
    (tmp_path / "texts").symlink_to(script.parents[1] / "texts")
    (folder / script.name).write_bytes(script.read_bytes())
    subprocess.run([sys.executable, str(folder / script.name)], check=True, timeout=60)
    assert (folder / WORKLOAD.name).read_bytes() == WORKLOAD.read_bytes()


def test_the_workload_is_conversations_of_four_turns_with_four_system_prompts(workload: Workload) -> None:
    assert len(workload.systems) == 4
    assert {conversation.system for conversation in workload.conversations} == {0, 1, 2, 3}
    assert len(workload.conversations) >= 48
    assert {len(conversation.turns) for conversation in workload.conversations} == {4}
    assert workload.answer_tokens == 48
    assert all(2_690 <= len(system) <= 2_720 for system in workload.systems)
    assert all(79 <= len(turn.text) <= 320 for each in workload.conversations for turn in each.turns)
    firsts = [conversation.turns[0].text[:60] for conversation in workload.conversations]
    assert len(set(firsts)) > 0.95 * len(firsts)


def test_arrivals_are_a_poisson_process_of_unit_rate(workload: Workload) -> None:
    arrivals = [conversation.arrival for conversation in workload.conversations]
    gaps = [after - before for before, after in zip([0.0, *arrivals], arrivals, strict=False)]
    error = 1 / math.sqrt(len(gaps))
    assert statistics.mean(gaps) == pytest.approx(1, abs=3 * error)
    assert statistics.pstdev(gaps) == pytest.approx(1, abs=6 * error)


def test_a_rate_needs_arrivals_until_its_end(workload: Workload) -> None:
    assert workload.max_rate(40) == pytest.approx(workload.conversations[-1].arrival * 4 / 40)
    assert workload.max_rate(40) > 12


def test_a_turn_begins_with_all_of_the_turns_before_it(workload: Workload) -> None:
    script = Scripts(workload, bytes_tokenizer()).salted(7)[5]
    conversation = workload.conversations[5]
    answer = "anything at all<|im_end|>\n"
    text = "".join(bytes(part).decode() + answer for part in script.parts)
    system = workload.systems[conversation.system]
    expected = f"<|im_start|>system\n000007 {system}<|im_end|>\n"
    for turn in conversation.turns:
        expected += f"<|im_start|>user\n{turn.text}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    assert text == expected.removesuffix("<|im_end|>\n")
    assert script.arrival == conversation.arrival
    assert script.think_s == tuple(turn.think_s for turn in conversation.turns)


def test_nothing_of_one_salt_is_the_beginning_of_another_and_all_are_as_long(workload: Workload) -> None:
    scripts = Scripts(workload, bytes_tokenizer())
    one, other = scripts.salted(1), scripts.salted(123_456)
    shared = len("<|im_start|>system\n")
    assert all(mine.parts[0][shared] != its.parts[0][shared] for mine, its in zip(one, other, strict=True))
    assert [list(map(len, mine.parts)) for mine in one] == [list(map(len, its.parts)) for its in other]
    assert all(mine.parts[1:] == its.parts[1:] for mine, its in zip(one, other, strict=True))
    assert scripts.salted(1) == one


def test_conversations_of_one_system_prompt_share_it(workload: Workload) -> None:
    scripts = Scripts(workload, bytes_tokenizer()).salted(3)
    prefixes = {bytes(script.parts[0][: 19 + 2_700]) for script in scripts}
    assert len(prefixes) == 4


def test_a_model_without_a_chat_template_is_refused(workload: Workload) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        Scripts(workload, bytes_tokenizer(template=None))


def test_a_template_that_changes_answers_is_refused(workload: Workload) -> None:
    forgetful = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}"
    with pytest.raises(ConfigError, match="changes what an assistant said"):
        Scripts(workload, bytes_tokenizer(forgetful)).salted(0)


def chat(**changes: object) -> bytes:
    turns = [{"text": "Hello", "think_s": 1}]
    conversations = [{"arrival": arrival, "system": 0, "turns": turns} for arrival in (0.5, 1.5)]
    return json.dumps({"answer_tokens": 4, "systems": ["Be kind."], "conversations": conversations} | changes).encode()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"{", "is no workload: Input data was truncated"),
        (b"\xff", "is no workload"),
        (chat(answer_tokens=1), r"`int` >= 2 - at `\$.answer_tokens`"),
        (chat(conversations=[]), r"length >= 1 - at `\$.conversations`"),
        (chat(note="hello"), "unknown field `note`"),
        (chat(conversations=json.loads(chat())["conversations"][::-1]), "in the order of their arrivals"),
        (chat(conversations=[json.loads(chat())["conversations"][0] | {"system": 1}]), "has system prompt 1 of 1"),
    ],
)
def test_what_is_no_workload_is_refused_with_its_name(tmp_path: Path, data: bytes, problem: str) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=problem) as caught:
        load_workload(path)
    assert str(path) in str(caught.value)


def test_a_missing_workload_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.json is not there.*in a checkout"):
        load_workload(tmp_path / "nothing.json")
