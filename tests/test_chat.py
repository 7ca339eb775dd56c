"""Talking in the terminal: a model is asked as it was trained, and the program outlives every mistake."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import tiny_chat
import torch
from PIL import Image
from tiny_chat import QUESTION

import matvlm
from matvlm.chat.speaker import Speaker, open_image, teacher_of
from matvlm.chat.terminal import Conversation
from matvlm.cli import main
from matvlm.data.encoding import Encoder, Turn
from matvlm.generation import Sampling

ROOT = Path(__file__).resolve().parents[1]
TURNS = [Turn(QUESTION, "a circle"), Turn("is there a red circle", "no"), Turn("what color", "")]
FIGURES = re.compile(r"\[(\d+) tokens, first after [\d,]+ ms, then [\d,.]+ tokens/s(, stopped)?\]")
LINE_SECONDS = 60.0


@pytest.fixture(scope="module")
def speaker(talkers: Path) -> Speaker:
    return Speaker(str(talkers / "student"), "cpu")


@pytest.mark.parametrize("typed", [False, True], ids=["plain", "token types"])
@pytest.mark.parametrize("count", range(len(TURNS) + 1))
def test_a_question_is_what_the_processor_makes_of_the_whole_conversation(count: int, typed: bool) -> None:
    processor = tiny_chat.build_processor(typed)
    asked = Encoder(processor).ask(tiny_chat.picture(), QUESTION, TURNS[:count])
    expected = tiny_chat.prompt(processor, QUESTION, TURNS[:count])
    assert asked.keys() == expected.keys()
    assert ("mm_token_type_ids" in asked) is typed
    for name, value in expected.items():
        assert torch.equal(asked[name], value), name


def test_a_question_is_what_stands_before_its_answer_in_training() -> None:
    processor = tiny_chat.build_processor()
    encoder = Encoder(processor)
    picture, turns = tiny_chat.picture(), TURNS[:2]
    trained = encoder.encode("one", picture, turns).input_ids
    answers = [len(encoder.tokenizer(turn.answer)["input_ids"]) + 1 for turn in turns]
    asked = encoder.ask(picture, turns[1].question, turns[:1])["input_ids"][0]
    assert torch.equal(asked, trained[: len(trained) - answers[1]])
    first = encoder.ask(picture, turns[0].question)["input_ids"][0]
    assert torch.equal(first, trained[: len(first)])
    assert torch.equal(Encoder(processor, max_length=8).ask(picture, turns[0].question)["input_ids"][0], first)


def test_the_answers_of_a_conversation_are_those_of_generate(
    talkers: Path, speaker: Speaker, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = matvlm.load(str(talkers / "student"))
    conversation, turns = (
        Conversation(speaker, open_image(str(talkers / "picture.png")), Sampling(max_new_tokens=7)),
        [],
    )
    for question in (QUESTION, "is there a circle", "no"):
        conversation.obey(f"  {question} ")
        expected = tiny_chat.answer(model, processor, question, turns, 7)
        printed = capsys.readouterr()
        assert printed.out == f"{expected}\n"
        found = FIGURES.fullmatch(printed.err.splitlines()[-1])
        assert found
        assert int(found[1]) == 7
        turns.append(Turn(question, expected))
    assert conversation.turns == turns
    conversation.obey("/reset")
    conversation.obey("")
    assert conversation.turns == []
    conversation.obey(QUESTION)
    assert conversation.turns == turns[:1]


def test_another_image_is_another_conversation(talkers: Path, speaker: Speaker, tmp_path: Path) -> None:
    conversation = Conversation(speaker, tiny_chat.picture(), Sampling(max_new_tokens=3))
    conversation.obey(QUESTION)
    before = conversation.turns
    Image.new("L", (9, 5), 255).save(tmp_path / "two words.png")
    for line in ("/image nowhere.png", f"/image {talkers / 'student' / 'config.json'}", "/imag"):
        with pytest.raises((ValueError, OSError)):
            conversation.obey(line)
    assert (conversation.turns, conversation.image.size) == (before, (16, 16))
    conversation.obey(f"/image {tmp_path / 'two words.png'}")
    assert (conversation.turns, conversation.image.size, conversation.image.mode) == ([], (9, 5), "RGB")


def test_draws_repeat_with_the_seed_and_differ_within_a_conversation(speaker: Speaker) -> None:
    def talk(seed: int) -> list[str]:
        sampling = Sampling(max_new_tokens=12, temperature=5.0, seed=seed)
        conversation = Conversation(speaker, tiny_chat.picture(), sampling)
        answers = []
        for _ in range(3):
            conversation.obey(QUESTION)
            answers.append(conversation.turns[-1].answer)
            conversation.obey("/reset")
        return answers

    first = talk(1)
    assert first == talk(1)
    assert len({*first, *talk(10)}) == 6
    assert talk(2)[:2] == first[1:]


class Terminal:
    """The real command in a real terminal."""

    def __init__(self, *arguments: str):
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background of a shell
            os.execvpe(sys.executable, [sys.executable, "-m", "matvlm", *arguments], os.environ | {"TERM": "dumb"})
        self.shown = ""

    def see(self, pattern: str, again: str = "") -> str:
        """Wait for ``pattern``; what was shown up to its end, and is then forgotten.

        ``again`` is typed each second, as by somebody who sees nothing happen: a Ctrl-C that comes just when a line
        begins to be read stays unnoticed until another key is pressed.
        """
        started = typed = time.monotonic()
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < started + LINE_SECONDS, self.shown[-500:]
            if again and time.monotonic() > typed + 1:
                self.type(again)
                typed = time.monotonic()
            if select.select([self.master], [], [], 0.1)[0]:
                self.shown += os.read(self.master, 4096).decode()
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        """Read on to the end; the exit status."""
        with suppress(OSError):  # when the other side has closed
            while os.read(self.master, 4096):
                pass
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.master)


def test_the_terminal_stops_answers_and_goes_on(talkers: Path) -> None:
    arguments = ["--image", str(talkers / "picture.png"), "--max-new-tokens", "7000"]
    terminal = Terminal("chat", str(talkers / "student"), *arguments)
    try:
        assert "Mamba-2 in 1 of 2 layers" in terminal.see("> ")
        terminal.type("what\x03")
        terminal.see("> ", again="\x03")
        terminal.type(f"{QUESTION}\n")
        terminal.see(r"\n.{60}")
        terminal.type("\x03")
        found = re.search(FIGURES, terminal.see(r"tokens/s.*\]"))
        assert found
        assert found[2]
        assert 3 < int(found[1]) < 7000
        terminal.see("> ")
        terminal.type("/image nowhere.png\n")
        terminal.see("nowhere.png: cannot read: No such file")
        terminal.see("> ")
        terminal.type("\x04")
        assert terminal.end() == 0
    finally:
        terminal.close()


def test_one_prompt_can_be_scripted(talkers: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "matvlm",
        "chat",
        str(talkers / "student"),
        "--image",
        str(talkers / "picture.png"),
    ]
    command += ["--prompt", QUESTION, "--max-new-tokens", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    expected = tiny_chat.answer(*matvlm.load(str(talkers / "student")), QUESTION, [], 5)
    assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr
    assert FIGURES.fullmatch(done.stderr.strip())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{talkers}/student", "--image", "nowhere.png"], "nowhere.png: cannot read: No such file or directory"),
        (["{talkers}/student", "--image", "{talkers}"], "cannot read: Is a directory"),
        (
            ["{talkers}/student", "--image", "{talkers}/student/config.json"],
            "config.json: no image, or a damaged one: ",
        ),
        (["./nowhere"], "./nowhere: no such file or folder"),
        (["package://nothing"], "matvlm ships no model 'nothing'"),
        (["{talkers}/mute"], "mute: needs an image processor and a chat template to answer questions"),
        (["{talkers}/student", "--temperature", "-1"], "temperature -1.0: 0 for the most probable token"),
        (["{talkers}/student", "--max-new-tokens", "0"], "max_new_tokens 0: at least 1"),
        (
            ["{talkers}/student", "--prompt", "is <image> red"],
            "the question holds <image>, which stands for the image",
        ),
    ],
)
def test_what_a_user_gets_wrong_is_one_message(
    talkers: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    if not (talkers / "mute").exists():
        shutil.copytree(talkers / "student", talkers / "mute")
        (talkers / "mute" / "chat_template.jinja").unlink()
    words = ["--image", "{talkers}/picture.png", "--prompt", "what", *arguments]
    assert main(["chat", *(word.format(talkers=talkers) for word in words)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    last = printed.err.splitlines()[-1]
    assert last.startswith("matvlm chat: ")
    assert message in last


def test_a_model_says_what_teacher_it_had(talkers: Path) -> None:
    assert teacher_of(str(talkers / "student")) == str(talkers / "teacher")
    assert teacher_of(str(talkers / "teacher")) is None
    assert teacher_of("package://easyvqa-teacher") is None
